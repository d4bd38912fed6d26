"""The accumulation that ``data.token_budget`` finds: the least, and the same run as without it."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

from rotopo.data.mixture import Share, SourceMixture
from rotopo.data.sampler import StepSampler
from rotopo.objectives import DPO
from rotopo.run.accumulation import least
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config
from tests.test_training import (
    CHECKPOINTS,
    EXACT,
    Kill,
    Killed,
    assert_equal,
    fit,
    last_checkpoint,
    weights,
)

# Steps of the small run are 6 pairs of 60 to 104 tokens each: three micro-batches.
BUDGET = "--data.token_budget=300"

rows = st.tuples(st.integers(1, 50), st.lists(st.integers(1, 50), min_size=1, max_size=2))


def cost(lengths, layout: str) -> int:
    """Tokens of a batch, padding included: a response's last is no input."""
    lines = [[prompt, *(n - 1 for n in responses)] for prompt, responses in lengths]
    if layout == "padded":  # a line for each response
        lines = [[prompt, n - 1] for prompt, responses in lengths for n in responses]
    tokens = [sum(line) for line in lines]
    return sum(tokens) if layout == "packed" else len(tokens) * max(tokens)


def fewest_runs(ordered, layout: str, budget: int) -> int:
    """The fewest runs of neighbours that cost no more than the budget each, by trying all."""

    @cache
    def of(start: int) -> int:
        if start == len(ordered):
            return 0
        ends = range(start + 1, len(ordered) + 1)
        return min(1 + of(end) for end in ends if cost(ordered[start:end], layout) <= budget)

    return of(0)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt", "padded"])
@settings(max_examples=15)
@given(
    lengths=st.lists(rows, min_size=12, max_size=30),
    more=st.integers(0, 300),
    ranks=st.integers(1, 3),
    length_window=st.integers(1, 3),
)
def test_it_is_the_least_for_all_epochs(layout, lengths, more, ranks, length_window):
    budget = max(cost([one], layout) for one in lengths) + more
    (sampler, *_) = samplers = [
        StepSampler(lengths, 6, 1, ranks, rank, 0, budget, layout, length_window)
        for rank in range(ranks)
    ]
    found = least(sampler, epochs=3)
    needed = 1
    for epoch in range(3):
        for step in sampler.steps_of(epoch):
            ordered = [lengths[i] for i in sampler.sizes.longest_first(step)]
            needed = max(needed, fewest_runs(ordered, layout, budget))
    assert found == -(-needed // ranks)
    if found * ranks > 6:
        return
    for one in samplers:
        one.accumulation = found
        for epoch in range(3):
            one.set_epoch(epoch)
            assert all(cost([lengths[i] for i in part], layout) <= budget for part in one)


@settings(max_examples=15)
@given(
    lengths=st.lists(rows, min_size=8, max_size=12),
    chance=st.randoms(use_true_random=False),
    repetitions=st.sampled_from([None, 1.0, 2.5]),
)
def test_without_an_end_it_is_enough_for_any_epoch(lengths, chance, repetitions):
    """Of one source that has each pair once, in any order; or of two, with repetitions."""
    mixture = None
    if repetitions is not None:
        sources = np.arange(len(lengths)) % 2
        mixture = SourceMixture([Share("a", None, repetitions), Share("b")], sources)
    for layout in ("packed", "shared_prompt", "padded"):
        budget = max(cost([one], layout) for one in lengths) + 40
        sampler = StepSampler(lengths, 6, 1, 1, 0, 0, budget, layout, 2, mixture)
        enough = least(sampler, None)
        steps = [step for epoch in range(5) for step in sampler.steps_of(epoch)]
        if mixture is None:
            steps += [chance.sample(range(len(lengths)), 6) for _ in range(5)]
        for step in steps:
            ordered = [lengths[i] for i in sampler.sizes.longest_first(step)]
            assert fewest_runs(ordered, layout, budget) <= enough


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


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=2", "--data.layout=padded", "--data.token_budget=600"],
        *(
            pytest.param([*options, BUDGET], marks=pytest.mark.slow)
            for options in (
                ["--trainer.limit_train_batches=2", "--trainer.val_check_interval=0.5"],
                [
                    "--trainer.limit_train_batches=0.7",
                    "--trainer.max_steps=3",
                    "--trainer.max_epochs=-1",
                ],
                ["--trainer.overfit_batches=1", "--trainer.max_epochs=2"],
            )
        ),
    ],
)
def test_a_run_is_the_same_as_without_a_budget(config, seen, options):
    options = [*EXACT, "--trainer.max_epochs=1", *options]
    _, without = seen(config, "without", *options, "--data.token_budget=null")
    found, within = seen(config, "within", *options)
    budget = found.datamodule.batching.token_budget
    assert max(within.tokens) <= budget < max(without.tokens)
    assert within.steps == [found.trainer.accumulate_grad_batches] * len(without.steps)
    assert within.validated == without.validated
    for one, other in zip(within.gradients, without.gradients, strict=True):
        assert_equal(one, other, rtol=0, atol=1e-10)


def test_a_run_that_is_killed_within_a_step_goes_on(config, seen):
    """The second of three, of three micro-batches each."""
    options = [*CHECKPOINTS, BUDGET, "--trainer.max_epochs=1"]
    whole, _ = seen(config, "whole", *options)
    with pytest.raises(Killed):
        seen(config, "killed", *options, also=[Kill(4, before=False)])
    (last,) = (config.parent / "killed").rglob("last.ckpt")
    resumed, one = seen(config, "killed", *options, f"--ckpt_path={last}")
    assert one.steps == [3, 3]
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "budget", "n"), [(2, 120, 6), (3, 1000, 1), (4, "null", 1)])
def test_another_budget_is_found_for_anew(config, seen, step, budget, n):
    options = [*EXACT, *CHECKPOINTS]
    whole, before = seen(config, "whole", *options, BUDGET)
    assert before.steps == [3] * 6
    (file,) = (config.parent / "whole").rglob(f"*step={step}.ckpt")
    goes_on = [f"--data.token_budget={budget}", f"--ckpt_path={file}"]
    resumed, one = seen(config, "resumed", *options, *goes_on)
    assert one.steps == [n] * (6 - step)
    assert_equal(weights(resumed), weights(whole), rtol=1e-7, atol=1e-9)


def test_two_ranks_take_fewer_and_go_on_from_one(config):
    """From the middle of the second epoch."""
    options = [*EXACT, *CHECKPOINTS, BUDGET]
    alone = fit(config, "alone", *options)
    (file,) = (config.parent / "alone").rglob("*step=4.ckpt")
    root = config.parent / "ranks"
    where = [f"--config={config}", f"--trainer.default_root_dir={root}", f"--ckpt_path={file}"]
    on_ranks(2, "fit", *where, *strategy("ddp"), *options)
    checkpoint = torch.load(last_checkpoint(root), weights_only=True)
    assert (alone.trainer.accumulate_grad_batches, checkpoint["accumulate_grad_batches"]) == (3, 2)
    assert checkpoint["global_step"] == 6
    assert_equal(checkpoint["state_dict"], weights(alone), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_round_of_fewer_pairs_has_fewer_micro_batches(config, seen):
    """Validation is every second step over all epochs, wherever the number changes; so it is for a
    run that goes on within a round, or between two."""
    options = [*EXACT, *CHECKPOINTS, "--data.pairs_per_step=4", "--trainer.max_epochs=3"]
    options += ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    options += ["--trainer.callbacks+=rotopo.robust.Alternation", "--trainer.callbacks.rho=0.3"]
    alone, without = seen(config, "alone", *options)
    options += ["--data.token_budget=205"]
    whole, within = seen(config, "whole", *options)
    assert within.steps == [3] * 5 + [2] * 6
    assert max(within.tokens) <= 205
    assert within.validated == without.validated == [2, 4, 6, 8, 10]
    assert_equal(weights(whole), weights(alone), rtol=1e-7, atol=1e-9)
    for step in (5, 7):
        (file,) = (config.parent / "whole").rglob(f"*step={step}.ckpt")
        resumed, one = seen(config, "resumed", *options, f"--ckpt_path={file}")
        assert one.steps == within.steps[step:]
        assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.slow
def test_the_same_trainer_goes_on(config, seen):
    """From Python: what the first fit found is no setting of the second's."""
    cli, one = seen(config, "parts", BUDGET, "--model.scheduler=null", "--trainer.max_epochs=1")
    trainer = cli.trainer
    trainer.fit_loop.max_epochs = 2
    cli.datamodule.batching = replace(cli.datamodule.batching, token_budget=120)
    trainer.fit(cli.model, cli.datamodule)
    assert (trainer.accumulate_grad_batches, trainer.global_step) == (6, 6)
    assert trainer.fit_loop.total_batch_idx + 1 == 6 * 6
    assert one.steps == [3] * 3 + [6] * 3


def test_what_cannot_be_is_refused_by_name(message):
    set_too_low = message(BUDGET, "--trainer.accumulate_grad_batches=2")
    assert "set trainer.accumulate_grad_batches to 3 or more, or leave it out" in set_too_low
    assert "val_check_interval is 4, but an epoch has 3 steps" in message(
        BUDGET, "--trainer.val_check_interval=4"
    )
    scheduler = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    options = [f"--trainer.callbacks+={scheduler}", "--trainer.callbacks.scheduling={1: 2}"]
    assert "GradientAccumulationScheduler would make steps of several" in message(*options)
