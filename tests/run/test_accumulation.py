"""The accumulation that ``data.token_budget`` finds, through the command line."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback

from rotopo.cli import run
from rotopo.data.batch import Sizes
from rotopo.objectives import DPO
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, EXACT, Kill, Killed, assert_equal, fit, weights

# Of 11 or so pairs of 60 to 140 tokens a step's six take several micro-batches.
BUDGET = "--data.token_budget=300"


class Seen(Callback):
    """What each step did: tokens of its micro-batches, its gradients, and validations."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.steps: list[int] = []  # micro-batches of each
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.tokens.append(batch.input_ids.numel())

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.steps.append(len(self.tokens) - sum(self.steps))
        named = module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_validation_start(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture
def seen(monkeypatch):
    """Runs with :class:`Seen`."""
    original = DPO.configure_callbacks

    def seen_by(config, root, *options, also=()):
        one = Seen()
        with monkeypatch.context() as patch:
            patch.setattr(DPO, "configure_callbacks", lambda self: [*original(self), one, *also])
            return fit(config, root, *options), one

    return seen_by


def found(cli) -> int:
    return cli.trainer.accumulate_grad_batches


def refused(config, capsys, *options: str) -> str:
    with pytest.raises(SystemExit):
        fit(config, "refused", *options)
    return capsys.readouterr().err


@pytest.mark.parametrize("kill", [(4, False), (9, True)])
def test_a_killed_run_goes_on(config, seen, kill):
    """Three micro-batches a step, three steps an epoch: within the second step, and between the
    epochs."""
    options = [*CHECKPOINTS, BUDGET, "--trainer.val_check_interval=1"]
    whole, _ = seen(config, "whole", *options)
    assert found(whole) == 3
    with pytest.raises(Killed):
        seen(config, "killed", *options, also=[Kill(*kill)])
    (last,) = (config.parent / "killed").rglob("last.ckpt")
    resumed, one = seen(config, "killed", *options, f"--ckpt_path={last}")
    assert found(resumed) == 3
    assert set(one.steps) == {3}
    assert resumed.trainer.global_step == 6
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


def test_another_budget_is_found_for_anew_and_the_same_is_kept(config, seen):
    options = [*EXACT, *CHECKPOINTS, "--model.scheduler.total_steps=9"]
    whole, _ = seen(config, "whole", *options, BUDGET, "--trainer.max_epochs=3")
    for step in 2, 3:
        (file,) = (config.parent / "whole").rglob(f"*step={step}.ckpt")
        for budget, n in ((300, 3), (120, 6), (1000, 1), ("null", 1)):
            resumed, one = seen(
                config, "resumed", *options, f"--data.token_budget={budget}", f"--ckpt_path={file}",
                "--trainer.max_epochs=3"
            )
            print(step, budget, one.steps, one.tokens)
            assert one.steps == [n] * (9 - step)
            assert_equal(weights(resumed), weights(whole), rtol=1e-7, atol=1e-9)


def test_rounds(config, seen, capsys):
    options = [
        *EXACT, *CHECKPOINTS,
        "--trainer.callbacks+=rotopo.robust.Alternation", "--trainer.callbacks.rho=0.3",
        "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=null",
        "--trainer.val_check_interval=2",
        "--data.pairs_per_step=4",
    ]
    alone, without = seen(config, "alone", *options)
    whole, within = seen(config, "whole", *options, "--data.token_budget=205")
    print(within.steps, without.validated, within.validated)
    assert within.validated == without.validated
    assert max(within.tokens) <= 205
    assert_equal(weights(whole), weights(alone), rtol=1e-7, atol=1e-9)
    for file in sorted((config.parent / "whole").rglob("*step=*.ckpt")):
        resumed, one = seen(config, "resumed", *options, "--data.token_budget=205", f"--ckpt_path={file}")
        print(file.name, one.steps)
        assert one.steps == within.steps[-len(one.steps):] if one.steps else 1
        assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=2", "--data.layout=padded", "--data.token_budget=600"],
        ["--trainer.val_check_interval=0.4", BUDGET],
        ["--trainer.limit_train_batches=2", BUDGET],
        ["--trainer.limit_train_batches=0.7", "--trainer.max_steps=5", "--trainer.max_epochs=-1", BUDGET],
        ["--trainer.overfit_batches=1", BUDGET],
        ["--trainer.fast_dev_run=2", BUDGET],
        ["--trainer.max_time=00:01:00:00", "--trainer.max_epochs=-1", "--trainer.max_steps=4", BUDGET],
    ],
)
def test_a_run_is_the_same_as_without_a_budget(config, seen, capsys, options):
    alone, without = seen(config, "without", *EXACT, *options, "--data.token_budget=null")
    found, within = seen(config, "within", *EXACT, *options)
    said = [line for line in capsys.readouterr().err.splitlines() if "token_budget" in line] 
    print(said, within.steps, within.tokens, within.validated, without.validated)
    budget = found.datamodule.batching.token_budget
    assert max(within.tokens) <= budget < max(without.tokens)
    assert within.steps == [found.trainer.accumulate_grad_batches] * len(without.steps)
    assert within.validated == without.validated
    for one, other in zip(within.gradients, without.gradients, strict=True):
        assert_equal(one, other, rtol=0, atol=1e-10)
