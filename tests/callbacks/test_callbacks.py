"""What the callbacks log, against its definition."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from rotopo.callbacks import Displacement
from rotopo.cli import run
from rotopo.metrics.means import PairMeans
from rotopo.report.plots import implicit_rewards
from tests.small_run import save_config

CONTRACT = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "rewards/sum",
    "logps/chosen",
    "logps/rejected",
]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def by_hand(cli, loader) -> dict[str, float]:
    """The metrics from whole log-probs, one pair at a time."""
    beta = cli.model.beta
    rows = []
    with torch.no_grad():
        for batch in loader:
            p = cli.model.policy.eval()(batch)
            for i in range(batch.n_pairs):
                up = float(p.chosen[i] - p.reference_chosen[i])
                down = float(p.rejected[i] - p.reference_rejected[i])
                margin = beta * (up - down)
                rows.append(
                    {
                        "loss": float(torch.log1p(torch.exp(torch.tensor(-margin)))),
                        "rewards/chosen": beta * up,
                        "rewards/rejected": beta * down,
                        "rewards/margin": margin,
                        "rewards/accuracy": float(margin > 0),
                        "rewards/sum": beta * (up + down),
                        "logps/chosen": float(p.chosen[i] / p.chosen_length[i]),
                        "logps/rejected": float(p.rejected[i] / p.rejected_length[i]),
                        "displacement/chosen_up": up,
                        "displacement/rejected_down": -down,
                    }
                )
    return dict(pd.DataFrame(rows).mean())


def test_validation_and_test_log_the_contract_and_it_is_right(config):
    cli = run(["fit", "--config", str(config), "--data.eval_pairs_per_batch=3"])
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    final = log.dropna(subset=["val/loss"]).iloc[-1]
    expected = by_hand(cli, cli.datamodule.val_dataloader())
    for name, value in expected.items():
        assert final[f"val/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    (tested,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    for name, value in by_hand(cli, cli.datamodule.test_dataloader()).items():
        assert tested[f"test/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    train = log.dropna(subset=["train/loss"])
    assert len(train) == cli.trainer.global_step == 6
    assert set(CONTRACT) <= {c.removeprefix("train/") for c in train.columns}
    assert train["speed/pairs_per_second"].gt(0).all()
    assert train["train/loss"].iloc[0] == pytest.approx(0.6931472, abs=1e-6)


def test_metrics_do_not_depend_on_the_batches(config):
    cli = run(["test", "--config", str(config)])
    other = run(["test", "--config", str(config), "--data.eval_pairs_per_batch=1"])
    for name, value in cli.trainer.callback_metrics.items():
        assert float(other.trainer.callback_metrics[name]) == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize("callback", ["ModelCheckpoint", "EarlyStopping"])
def test_callbacks_of_lightning_can_watch_the_accuracy(config, callback):
    cli = run(
        [
            *("fit", "--config", str(config)),
            f"--trainer.callbacks+={callback}",
            "--trainer.callbacks.monitor=val/rewards/accuracy",
            "--trainer.callbacks.mode=max",
        ]
    )
    (watching,) = (c for c in cli.trainer.callbacks if type(c).__name__ == callback)
    best = watching.best_model_score if callback == "ModelCheckpoint" else watching.best_score
    assert 0 <= float(best) <= 1


def test_orthogonality_is_logged_for_each_module_and_the_largest(config):
    cli = run(
        [
            *("fit", "--config", str(config)),
            "--model.policy.adapter=rotopo.rotation.RotationConfig",
            "--model.policy.adapter.target_modules=[q_proj,v_proj]",
        ]
    )
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    modules = [c for c in log if c.startswith("orthogonality/") and c != "orthogonality/max"]
    assert len(modules) == 4
    final = log.dropna(subset=["orthogonality/max"]).iloc[-1]
    assert final["orthogonality/max"] == final[modules].max()
    assert 0 < final["orthogonality/max"] < 1e-6


def test_means_over_uneven_batches():
    means = PairMeans(["a"])
    means.update({"a": (torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool))})
    means.update({"a": (torch.tensor([10.0]), torch.tensor([True]))})
    assert float(means.compute()["a"]) == 4.0


def test_means_of_the_rows_that_have_a_value():
    means = PairMeans(["a", "b", "c"])
    values = torch.tensor([1.0, float("nan"), 3.0])
    some, none = torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)
    means.update({"a": (values, some), "b": (values, none), "c": (values, ~none)})
    found = means.compute()
    assert found.keys() == {"a", "c"}
    assert float(found["a"]) == 2.0
    assert found["c"].isnan()  # what is there and is not a number is not passed over


def steps_of(callback: Displacement, up: float, down: float, n: int) -> list:
    log_probs = SimpleNamespace(
        reference_chosen=torch.zeros(2),
        chosen_log_ratio=torch.full((2,), float(up)),
        rejected_log_ratio=torch.full((2,), -float(down)),
        has_chosen=torch.ones(2, dtype=torch.bool),
        has_rejected=torch.ones(2, dtype=torch.bool),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(n):
            values = callback.values({"pairs": SimpleNamespace(log_probs=log_probs)})
            callback.after_step({name: value.mean() for name, (value, _) in values.items()})
    return caught


def test_displacement_warns_once_when_both_fall():
    callback = Displacement(window=4)
    assert not steps_of(callback, up=-5, down=9, n=3)
    caught = steps_of(callback, up=-5, down=9, n=10)
    assert len(caught) == 1
    assert "5.0 nats below" in str(caught[0].message)
    assert "9.0 below" in str(caught[0].message)


@pytest.mark.parametrize(("up", "down"), [(5, 9), (-5, -9), (-0.5, 9)])
def test_displacement_is_silent_otherwise(up, down):
    assert not steps_of(Displacement(window=4), up=up, down=down, n=10)


def test_the_plot_is_drawn(config, tmp_path):
    cli = run(["fit", "--config", str(config)])
    picture = tmp_path / "rewards.png"
    implicit_rewards(Path(cli.trainer.log_dir), picture)
    assert picture.stat().st_size > 10_000
