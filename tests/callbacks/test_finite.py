"""A loss or a gradient that is not finite ends a run, and leaves all as it was."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from rotopo.callbacks.finite import Finite
from rotopo.errors import InputError
from rotopo.run.checkpoints import read
from tests.ranks import on_ranks
from tests.small_run import save_config
from tests.test_distributed import LORA, arguments, ranks
from tests.test_training import CHECKPOINTS, assert_equal, fit, last_checkpoint


class Poison(Callback):
    """Has the loss, or its gradient alone, be no number for some rows in one optimiser step."""

    def __init__(self, rows: list[int], step: int, gradient: bool = False) -> None:
        self.rows = torch.tensor(rows)
        self.step = step
        self.gradient = gradient
        self.poisoned = torch.empty(0)

    def on_train_start(self, trainer, module) -> None:
        losses, step = module.losses, module._step

        def poisoned(log_probs):
            values = losses(log_probs)
            if not module.training or trainer.global_step + 1 != self.step:
                return values
            here = torch.isin(self.batch.rows, self.rows) if len(self.rows) else values > -1
            if self.gradient:  # √0 has none
                return values + torch.where(here, 0 * values, 1).sqrt() - (~here).float()
            return torch.where(here, torch.nan, values)

        def seen(batch):
            self.batch = batch
            return step(batch)

        module.losses, module._step = poisoned, seen


POISON = "--trainer.callbacks+=tests.callbacks.test_finite.Poison"


def poison(*rows: int, step: int = 4, gradient: bool = False) -> list[str]:
    options = [POISON, f"--trainer.callbacks.rows={list(rows)}", f"--trainer.callbacks.step={step}"]
    return [*options, f"--trainer.callbacks.gradient={gradient}"]


class Rows(Callback):
    """The rows of each step, by its number."""

    seen: dict[int, list[int]] = {}  # noqa: RUF012

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen.setdefault(trainer.global_step + 1, []).extend(batch.rows.tolist())


ROWS = "--trainer.callbacks+=tests.callbacks.test_finite.Rows"


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def whole(config: Path, *options: str) -> tuple[dict[int, list[int]], Path]:
    """A run that nothing happens to: its rows of each step, and its checkpoints' folder."""
    Rows.seen.clear()
    fit(config, "whole", ROWS, *CHECKPOINTS, *options)
    return dict(Rows.seen), config.parent / "whole"


def stopped(config: Path, capsys, *options: str) -> str:
    """The message of a run that stops."""
    with pytest.raises(SystemExit) as stop:
        fit(config, "run", *CHECKPOINTS, *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("rotopo: "))
    return line


def good_one(line: str) -> Path:
    """The checkpoint that a message names."""
    return Path(line.split("go on with --ckpt_path ")[1].rstrip("."))


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = folder.rglob(f"*step={step}.ckpt")
    return read(file)["state_dict"]


@pytest.mark.parametrize(
    ("options", "gradient"),
    [
        (["--trainer.gradient_clip_val=0.5"], True),
        pytest.param([], False, marks=pytest.mark.slow),
        pytest.param(["--trainer.accumulate_grad_batches=3"], False, marks=pytest.mark.slow),
        pytest.param(["--trainer.accumulate_grad_batches=3"], True, marks=pytest.mark.slow),
    ],
)
def test_a_pair_without_a_number_stops_the_run_before_the_step(config, capsys, gradient, options):
    """In the step's first micro-batch or in its last, and the run goes on without it."""
    rows, expected = whole(config, *options)
    for bad in (rows[4][0], rows[4][-1]):
        line = stopped(config, capsys, *options, *poison(bad, gradient=gradient))
        assert "optimiser step 4, epoch 1" in line
        if gradient:
            every = ", ".join(map(str, sorted(rows[4])))
            assert f"the norm of the gradient of rows {every} of data.source is not finite" in line
        else:
            assert f"the loss of row {bad} of data.source is not finite" in line
    folder = config.parent / "run"
    assert not list(folder.rglob("*step=4*.ckpt"))
    assert not list(folder.rglob(".*"))
    good = last_checkpoint(folder)
    assert read(good_one(line))["global_step"] == read(good)["global_step"] == 3
    assert_equal(read(good)["state_dict"], state(expected, 3), rtol=0, atol=0)
    fit(config, "on", *CHECKPOINTS, *options, f"--ckpt_path={good_one(line)}")
    assert_equal(state(config.parent / "on", 6), state(expected, 6), rtol=0, atol=0)


def test_so_does_a_step_that_was_far_too_long(config, capsys):
    """Nobody's row is to blame: all of the next step's are named, and not the whole of many."""
    options = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"]
    options += ["--model.scheduler=null", "--model.policy={adapter: null}"]
    options += ["--data.validation=0", "--data.test=0", "--data.pairs_per_step=40"]
    line = stopped(config, capsys, *options)
    assert "optimiser step 2, epoch 1" in line
    assert "lower the learning rate" in line
    named = re.search(r"rows ([\d, ]+) and 20 more of data.source", line)
    assert named is not None
    assert len(named[1].split(", ")) == 20
    assert read(good_one(line))["global_step"] == 1


def test_without_a_checkpoint_the_message_says_so(config, capsys):
    options = [*poison(step=1), "--trainer.enable_checkpointing=false"]
    with pytest.raises(SystemExit):
        fit(config, "run", *options)
    assert "there is no checkpoint to go on from." in capsys.readouterr().err


def test_a_checkpoint_on_exception_holds_the_weights_of_the_step_before(config, capsys):
    options = [*CHECKPOINTS, "--trainer.callbacks.every_n_train_steps=2"]
    options += ["--trainer.callbacks.save_on_exception=true", *poison(step=4)]
    _, expected = whole(config)
    with pytest.raises(SystemExit):
        fit(config, "run", *options)
    assert_equal(state(config.parent / "run", 3), state(expected, 3), rtol=0, atol=0)


def test_a_validation_without_a_number_is_logged_as_it_is(config):
    cli = fit(config, "run", "--trainer.callbacks+=tests.callbacks.test_finite.BadValidation")
    assert cli.trainer.global_step == 6
    assert cli.trainer.callback_metrics["val/loss"].isnan()
    assert cli.trainer.callback_metrics["train/loss"].isfinite()


class BadValidation(Callback):
    def on_validation_start(self, trainer, module) -> None:
        self.losses = module.losses
        module.losses = lambda log_probs: self.losses(log_probs) * torch.nan

    def on_validation_end(self, trainer, module) -> None:
        module.losses = self.losses


@pytest.mark.parametrize(("loss", "gradient"), [(0.5, torch.inf), (torch.nan, 0.0)])
def test_a_scaler_of_gradients_leaves_steps_out_itself(loss, gradient):
    """Half precision's scaler tries a smaller factor after gradients that overflowed; a loss that
    is no number is none with any factor."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), gradient)
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=torch.amp.GradScaler("cpu")),
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value, broadcast=lambda x: x),
        **{"global_step": 0, "current_epoch": 0, "checkpoint_callback": None},
        is_global_zero=True,
    )
    module: Any = SimpleNamespace(row_losses=torch.tensor([loss]))
    callback = Finite()
    callback.on_train_batch_start(trainer, module, SimpleNamespace(rows=torch.tensor([5])), 0)
    callback.on_before_backward(trainer, module, torch.tensor(loss))
    refused = pytest.raises(InputError, match="the loss of row 5")
    with refused if loss != 0.5 else nullcontext():
        callback.on_before_optimizer_step(trainer, module, torch.optim.SGD([parameter]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp"])
@pytest.mark.parametrize("gradient", [False, True])
def test_ranks_stop_together(config, how, gradient):
    """The pair is in a micro-batch of one of them; each says the same, and none waits."""
    rows, expected = whole(config, *LORA)
    options = [*CHECKPOINTS, *LORA, *poison(rows[4][0], gradient=gradient), *ranks(how)]
    with pytest.raises(RuntimeError) as failed:
        on_ranks(2, *arguments(config, "two", options))
    output = str(failed.value)
    lines = [line for line in output.splitlines() if line.startswith("rotopo: ")]
    assert len(lines) == output.count("status 2") == 2
    assert lines[0] == lines[1]
    what = "the norm of the gradient of rows" if gradient else f"the loss of row {rows[4][0]} of"
    assert what in lines[0]
    assert "Traceback" not in output
    assert read(good_one(lines[0]))["global_step"] == 3
    assert not list((config.parent / "two").rglob("*step=4*"))
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    assert_equal(state(config.parent / "two", 3), state(expected, 3), **tolerance)
