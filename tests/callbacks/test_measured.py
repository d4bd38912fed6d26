"""What is only measured is left out where it cannot be had, and never ends a fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from rotopo.callbacks import geometry, speed
from rotopo.callbacks.arithmetic import Decoder
from rotopo.callbacks.measured import LeftOut, Measured
from rotopo.cli import run
from rotopo.errors import InputError
from rotopo.metrics import geometry as rotation_geometry
from rotopo.models import backbone, loading, policy
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config
from tests.test_training import fit

GEOMETRY = ["--trainer.callbacks+=Geometry", "--trainer.callbacks.every_n_steps=2"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def one_rank(others_can: bool = True) -> Any:
    def all_of(here: bool) -> bool:
        return here and others_can

    return SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=all_of))


def fails(*_: Any, **__: Any) -> Any:
    raise AttributeError("'Odd' has no attribute 'nx'\nand more")


def lines(said: Any) -> list[str]:
    return [str(warning.message) for warning in said if warning.category is LeftOut]


def test_a_statistic_that_fails_is_left_out_for_good_and_said_once():
    measured, calls = Measured(), []
    assert measured(one_rank(), "speed/mfu", lambda: 3) == 3

    def measure() -> None:
        calls.append(1)
        fails()

    with pytest.warns(LeftOut) as said:
        found = [measured(one_rank(), "speed/mfu", measure) for _ in range(3)]
    assert found == [None] * 3
    (line,) = lines(said)
    assert line == (
        "speed/mfu: left out of this run, since it cannot be had (AttributeError: 'Odd' has no "
        "attribute 'nx')."
    )
    assert len(calls) == 1
    assert measured(one_rank(), "another", lambda: 4) == 4


def test_what_the_user_has_set_is_refused_all_the_same():
    def refuses() -> None:
        raise InputError("file: there is none.")

    with pytest.raises(InputError, match="there is none"):
        Measured()(one_rank(), "test/perplexity", refuses)


def test_a_rank_leaves_out_what_another_cannot_have(monkeypatch):
    cause = ["", "KeyError: 'experts'"]
    monkeypatch.setattr("rotopo.ranks.of_all", lambda value: cause)
    with pytest.warns(LeftOut, match=r"KeyError: 'experts'"):
        assert Measured()(one_rank(others_can=False), "speed/mfu", lambda: 3) is None


class Odd(nn.Module):
    """A linear layer that is none to anyone who looks."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kernel = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel.T


def load_odd(*arguments: Any, **settings: Any) -> Any:
    model = loading.load_model(*arguments, **settings)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Odd(child))
    return model


def logged(cli: Any) -> pd.DataFrame:
    return pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv").dropna(axis=1, how="all")


def test_a_model_of_unknown_layers_trains_and_loses_what_hangs_on_them(config, monkeypatch):
    monkeypatch.setattr(policy, "load_model", load_odd)
    with pytest.warns(LeftOut) as said:
        cli = fit(config, "run", "--model.policy={adapter: null}", *GEOMETRY)
    (line,) = lines(said)
    assert line.startswith("speed/tokens_computed, speed/tokens_avoided and speed/floor_share: ")
    assert "LlamaForCausalLM has no linear layers" in line
    log = logged(cli)
    assert log["train/loss"].notna().sum() == 6
    speeds = {name for name in log if name.startswith("speed/")}
    assert speeds == {f"speed/{name}_per_second" for name in ("pairs", "tokens")} | {
        "speed/memory_gib"
    }
    assert "geometry/effective_rank/02" in log  # and no geometry of weights that are not there
    assert "geometry/neuron_cosine" not in log


@pytest.mark.parametrize(
    ("owner", "name", "line", "gone", "kept"),
    [
        (speed.Decoder, "of", "speed/tokens_computed", "speed/floor_share", "speed/memory_gib"),
        (
            rotation_geometry,
            "orthogonality_errors",
            "orthogonality: left out",
            "orthogonality/max",
            "train/loss",
        ),
        (
            backbone,
            "layer_states",
            "geometry of hidden states: left out",
            "geometry/distance/00",
            "geometry/neuron_cosine",
        ),
        (
            rotation_geometry,
            "merged_weights",
            "geometry of weights: left out",
            "geometry/neuron_cosine",
            "geometry/distance/00",
        ),
    ],
)
def test_each_leaves_out_its_own_alone(config, monkeypatch, owner, name, line, gone, kept):
    monkeypatch.setattr(owner, name, fails)
    rotation = "--model.policy.adapter=rotopo.rotation.RotationConfig"
    with pytest.warns(LeftOut) as said:
        cli = fit(config, "run", *GEOMETRY, rotation)
    assert cli.trainer.global_step == 6
    (found,) = lines(said)
    assert found.startswith(line)
    assert found.endswith("cannot be had (AttributeError: 'Odd' has no attribute 'nx').")
    log = logged(cli)
    assert gone not in log
    assert kept in log
    assert cli.model.language_model.training  # as training left it


def test_displacement_beside_a_reward_model_is_silent(config, tmp_path):
    model = ["--model=rotopo.reward.RewardModule", f"--model.backbone.path={tmp_path / 'model'}"]
    own = "--trainer.callbacks+=rotopo.callbacks.Displacement"
    cli = fit(config, "run", *model, "--model.backbone.dtype=float32", own)
    assert "train/rewards/margin" in cli.trainer.callback_metrics
    assert not any("displacement" in name for name in cli.trainer.callback_metrics)


@pytest.mark.parametrize("positions", [None, 3])
def test_perplexity_asks_for_no_positions_that_a_model_does_not_count(
    config, tmp_path, monkeypatch, positions, capsys
):
    """Of settings that do not fit it says so as ever."""
    load = loading.load_model

    def without(*arguments: Any, **settings: Any) -> Any:
        model = load(*arguments, **settings)
        vars(model.config)["max_position_embeddings"] = positions
        return model

    monkeypatch.setattr(policy, "load_model", without)
    (tmp_path / "text.txt").write_text("a film of some wit")
    own = ["--trainer.callbacks+=Perplexity", f"--trainer.callbacks.file={tmp_path / 'text.txt'}"]
    command = ["test", "--config", str(config), *own]
    if positions is None:
        assert "test/perplexity" in run(command).trainer.callback_metrics
    else:
        with pytest.raises(SystemExit) as stop:
            run(command)
        assert stop.value.code == 2
        assert "window is 512: the model has 3 positions only" in capsys.readouterr().err


def test_a_perplexity_that_no_number_holds_ends_no_test(config, tmp_path, monkeypatch):
    monkeypatch.setattr("rotopo.metrics.perplexity.math.exp", lambda x: 10.0 ** (x * 1e6))
    (tmp_path / "text.txt").write_text("a film of some wit")
    own = ["--trainer.callbacks+=Perplexity", f"--trainer.callbacks.file={tmp_path / 'text.txt'}"]
    with pytest.warns(LeftOut, match=r"test/perplexity: left out.*OverflowError"):
        cli = run(["test", "--config", str(config), *own])
    assert "test/accuracy" in cli.trainer.callback_metrics


class FailsOnSecond(Callback):
    """The second rank cannot say what a step costs, nor look at weights."""

    def setup(self, trainer, module, stage) -> None:
        if trainer.global_rank == 1:
            Decoder.of = fails  # type: ignore[method-assign]
            rotation_geometry.neuron_cosine = fails  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.filterwarnings("always::rotopo.callbacks.measured.LeftOut")
def test_ranks_leave_out_the_same(config):
    """And none waits for another that does not come."""
    assert geometry.Measured is Measured
    options = [*strategy("ddp"), *GEOMETRY]
    options += ["--trainer.callbacks+=tests.callbacks.test_measured.FailsOnSecond"]
    folder = config.parent / "runs"
    on_ranks(2, "fit", f"--config={config}", *options)
    log = pd.read_csv(next(folder.rglob("metrics.csv"))).dropna(axis=1, how="all")
    assert "speed/floor_share" not in log
    assert "geometry/neuron_cosine" not in log
    assert "geometry/effective_rank/02" in log
    assert "speed/pairs_per_second" in log
