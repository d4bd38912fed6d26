"""The router loss of a mixture of experts through the command line: trained with, and logged."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from rotopo.cli import run
from tests.models.families import make
from tests.ranks import on_ranks, strategy
from tests.reward.test_runs import save_reward_config
from tests.small_run import save_config
from tests.test_training import weights

QUICK = ["--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=2"]


def saved(save, folder: Path, tokenizer) -> Path:
    config = save(folder, tokenizer)
    model = make("mixtral", torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    return config


def fit(config: Path, root: str, *options: str):
    folder = f"--trainer.default_root_dir={config.parent / root}"
    return run(["fit", "--config", str(config), folder, *QUICK, *options])


def logged(cli) -> pd.DataFrame:
    return pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")


@pytest.mark.parametrize(
    ("save", "setting"),
    [
        pytest.param(save_config, "policy", id="DPO"),
        pytest.param(save_reward_config, "backbone", id="reward", marks=pytest.mark.slow),
    ],
)
def test_it_is_trained_with_and_logged(save, setting, tmp_path, tiny_tokenizer):
    config = saved(save, tmp_path, tiny_tokenizer)
    runs = {
        name: fit(config, name, *(f"--model.{setting}.router_loss={v}" for v in value))
        for name, value in {"own": [], "off": [0], "large": [1000]}.items()
    }
    found = {name: weights(cli) for name, cli in runs.items()}

    def equal(one: str, other: str) -> bool:
        return all(torch.equal(value, found[other][name]) for name, value in found[one].items())

    assert not equal("own", "off")
    assert not equal("off", "large")
    names = {"train/router_loss", "val/router_loss"}
    for name, cli in runs.items():
        log = logged(cli)
        assert (names <= set(log)) == (name != "off")
        if name != "off":
            assert log["train/router_loss"].dropna().between(1.5, 6).all()
    # The large one is for even use, of which the least is 2.
    last = {n: logged(runs[n])["val/router_loss"].dropna().iloc[-1] for n in ("own", "large")}
    assert last["large"] < last["own"]


def test_a_model_without_experts_refuses_it(tmp_path, tiny_tokenizer, capsys):
    config = save_config(tmp_path, tiny_tokenizer)
    with pytest.raises(SystemExit) as stop:
        fit(config, "run", "--model.policy.router_loss=0.1")
    assert stop.value.code == 2
    assert "policy.router_loss is 0.1, but llama is no mixture" in capsys.readouterr().err


def test_a_mixture_of_experts_trains_in_float64(tmp_path, tiny_tokenizer):
    config = saved(save_config, tmp_path, tiny_tokenizer)
    cli = fit(config, "run", "--model.policy.dtype=float64", "--trainer.max_steps=1")
    assert cli.model.language_model.dtype == torch.float64
    assert cli.trainer.global_step == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("adapter", [True, False])
def test_it_trains_on_several_ranks(how, adapter, tmp_path, tiny_tokenizer):
    """Its value hangs on how a step is cut, so it is only near that of one process."""
    config = saved(save_config, tmp_path, tiny_tokenizer)
    options = [*QUICK, "--model.policy.activation_checkpointing=true"]
    if not adapter:
        options.append("--model.policy={adapter: null, dtype: float32}")
        options.append(f"--model.policy.path={tmp_path / 'model'}")
    one = fit(config, "one", *options)
    folder = f"--trainer.default_root_dir={tmp_path / 'two'}"
    on_ranks(2, "fit", "--config", str(config), *strategy(how), folder, *options)
    (file,) = (tmp_path / "two").rglob("metrics.csv")
    log = pd.read_csv(file)
    for name in ("train/router_loss", "val/router_loss"):
        found, expected = (x[name].dropna().to_numpy() for x in (log, logged(one)))
        assert found == pytest.approx(expected, rel=0.2)
    found, expected = (x["val/loss"].dropna().to_numpy() for x in (log, logged(one)))
    assert found == pytest.approx(expected, rel=0.05)
