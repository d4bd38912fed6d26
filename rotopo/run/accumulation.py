"""How many micro-batches an optimiser step is cut into.

``trainer.accumulate_grad_batches`` says so where it is above 1. At 1, its default, a run with
``data.token_budget`` finds it: the least with which every micro-batch of the run is within the
budget, the same in all epochs of the same pairs. A step is the same pairs with any number, and the
rest of the run is the same too: ``trainer.limit_train_batches``, ``overfit_batches`` and
``val_check_interval``, which Lightning counts in micro-batches, count steps then, as they do
without accumulation.

All epochs of the run are cut beforehand, to see what each step needs. Where they have no end
(``trainer.max_epochs`` of -1, ``max_time``), or too many rows to look at, it is what the longest
pairs need if they come together: more than most runs need, but enough for any order, so that no
later epoch is refused.
"""

import hashlib
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from rotopo.data.budget import parts_in_any_order, parts_needed
from rotopo.data.sampler import StepSampler
from rotopo.errors import InputError
from rotopo.run.lightning import callbacks_of
from rotopo.run.resume import Resumption

# Rows of all epochs that are looked at beforehand, about a microsecond each.
_MOST_ROWS = 10_000_000


@dataclass(frozen=True)
class _Given:
    """A Trainer's settings, before anything is found."""

    accumulation: int
    limit: int | float
    interval: Any

    @classmethod
    def of(cls, trainer: Trainer) -> "_Given":
        limit, interval = trainer.limit_train_batches, trainer.val_check_interval
        return cls(trainer.accumulate_grad_batches, limit, interval)

    def put_back(self, trainer: Trainer) -> None:
        trainer.limit_train_batches = self.limit
        trainer.val_check_interval = self.interval

    def steps(self, of_epoch: int) -> int:
        """Steps of an epoch that are trained on, of so many."""
        if isinstance(self.limit, int):
            return min(self.limit, of_epoch)
        return int(of_epoch * self.limit)

    def count_steps(self, trainer: Trainer, of_epoch: int, accumulation: int) -> None:
        """Let the Trainer count in steps of so many micro-batches what it is given in batches.

        Raises:
            InputError: an epoch would have no step, or validations be further apart than its end.
        """
        steps = self.steps(of_epoch)
        if not steps:
            raise InputError(
                f"trainer.limit_train_batches is {self.limit}, which of an epoch's {of_epoch} "
                "steps leaves none: raise it."
            )
        if isinstance(self.limit, int):
            trainer.limit_train_batches = self.limit * accumulation
        elif self.limit < 1:
            trainer.limit_train_batches = _share(steps, of_epoch, accumulation)
        if isinstance(self.interval, int):
            within = trainer.check_val_every_n_epoch and trainer.limit_val_batches
            if within and self.interval > steps:
                raise InputError(
                    f"trainer.val_check_interval is {self.interval}, but an epoch has {steps} "
                    "steps: lower it, or let it count over epochs with "
                    "trainer.check_val_every_n_epoch: null."
                )
            trainer.val_check_interval = self.interval * accumulation
        elif isinstance(self.interval, float) and self.interval < 1:
            every = max(1, int(steps * self.interval))
            trainer.val_check_interval = _share(every, steps, accumulation)


class Accumulation:
    """The accumulation of a module's fits, which is asked for whenever a training loader is made.

    Args:
        resumption: knows the place in the run, which is counted in micro-batches.
    """

    def __init__(self, resumption: Resumption) -> None:
        self._resumption = resumption
        self._trainer: Any = None  # weakly, so that a copy of the module copies none
        self._given: _Given | None = None
        self._coupled = ""
        self._found: dict[str, Any] = {}  # the number, and what it was found for
        self._before: Mapping[str, Any] = {}  # the same of the checkpoint
        self._looked: tuple[Any, int] | None = None  # the last rows and epochs, and their least
        self._line = self._said = ""

    def begin(self, trainer: Trainer, coupled: str) -> None:
        """Know the settings of a fit that begins.

        Args:
            trainer: the fit's.
            coupled: name of the objective, if a pair's loss depends on its micro-batch; else empty.

        Raises:
            InputError: a callback would change the accumulation between epochs.
        """
        if any(isinstance(one, GradientAccumulationScheduler) for one in callbacks_of(trainer)):
            raise InputError(
                "trainer.callbacks: GradientAccumulationScheduler would make steps of several "
                "times data.pairs_per_step: leave it out. How many micro-batches a step has is "
                "trainer.accumulate_grad_batches, or found by data.token_budget."
            )
        if self._given is not None and self._trainer() is trainer:  # what an earlier fit found
            self._resumption.recut(trainer, self._given.accumulation)
            self._given.put_back(trainer)
        self._trainer, self._given = weakref.ref(trainer), _Given.of(trainer)
        self._coupled = coupled
        self._found, self._before, self._line, self._said = {}, {}, "", ""

    def is_found(self, token_budget: int | None) -> bool:
        """Whether the fit's is found, and not set.

        Args:
            token_budget: the data's.
        """
        given = self._given
        return token_budget is not None and given is not None and given.accumulation == 1

    def save(self) -> dict[str, Any]:
        """What a checkpoint holds of it; empty where nothing was found."""
        return self._found

    def load(self, saved: Mapping[str, Any]) -> None:
        """Keep a checkpoint's, for what it was found for.

        Args:
            saved: see :meth:`save`.
        """
        self._before = saved

    def __call__(self, sampler: StepSampler) -> int:
        """Micro-batches of a step on each rank; the Trainer counts by it from here on.

        Args:
            sampler: of the epoch that begins.

        Raises:
            InputError: it is set, and too few; or it takes more micro-batches than a step has
                pairs.
        """
        assert self._given is not None
        trainer, budget = self._trainer(), sampler.token_budget
        if budget is None:
            return self._given.accumulation
        steps, ranks = self._given.steps(sampler.steps), sampler.world_size
        epochs = _epochs(trainer, steps, sampler.pairs)
        rows = _digest(sampler)
        if self._looked is None or self._looked[0] != (rows, epochs):
            self._looked = (rows, epochs), least(sampler, epochs)
        needed = self._looked[1]
        if not self.is_found(budget):
            if epochs is not None and needed > self._given.accumulation:
                raise InputError(
                    f"A micro-batch would be over data.token_budget ({budget}): set "
                    f"trainer.accumulate_grad_batches to {needed} or more, or leave it out, and it "
                    "is found."
                )
            return self._given.accumulation
        if self._before.get("for") == rows:
            needed = max(needed, self._before["accumulation"])
        if needed * ranks > sampler.pairs_per_step:
            raise InputError(
                f"data.token_budget is {budget}, with which a step takes {needed} micro-batches on "
                f"each of {ranks} ranks, and has only {sampler.pairs_per_step} pairs "
                "(data.pairs_per_step): raise the one or the other."
            )
        self._resumption.recut(trainer, needed)
        self._given.count_steps(trainer, sampler.steps, needed)
        self._found = {"accumulation": needed, "for": rows}
        overfit = bool(trainer.overfit_batches)
        self._line = _line(budget, needed, epochs, self._given, overfit, self._coupled)
        return needed

    def say(self) -> None:
        """Print what was found, in one line, where that is new."""
        if self._line != self._said:
            rank_zero_info(self._line)
        self._said = self._line


def _share(n: int, of: int, accumulation: int) -> float:
    """What Lightning makes n steps of: it takes the whole part of so many micro-batches."""
    return (n * accumulation + 0.5) / (of * accumulation)


def _epochs(trainer: Trainer, steps: int, rows: int) -> int | None:
    """How many epochs the run has at most; None where that has no end, or too many to look at."""
    most: list[int] = []
    if trainer.max_epochs not in (None, -1):
        most.append(trainer.max_epochs)
    if trainer.max_steps != -1 and steps:
        # Of a run that goes on, epochs may have had fewer steps until now.
        more = trainer.current_epoch - trainer.global_step // steps
        most.append(math.ceil(trainer.max_steps / steps) + (more + 1 if more > 0 else 0))
    return min(most) if most and min(most) * rows <= _MOST_ROWS else None


def least(sampler: StepSampler, epochs: int | None) -> int:
    """The least micro-batches on each rank that all steps can be cut into within the budget."""
    sizes, budget = sampler.sizes, sampler.token_budget
    assert budget is not None
    mixture = sampler.mixture
    often = 1 if mixture is None else mixture.most
    most = parts_in_any_order(sizes, sampler.pairs_per_step, budget, often)
    if epochs is not None:
        found = 1
        for epoch in range(epochs):
            found = max(found, parts_needed(sizes, sampler.steps_of(epoch), budget))
            if found == most:
                break
        most = found
    return -(-most // sampler.world_size)


def _digest(sampler: StepSampler) -> str:
    """What the accumulation is found for: rows and their order, the budget, and the ranks."""
    facts = (sampler.token_budget, sampler.world_size, sampler.sizes.packed)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8)
    for part in (sampler.sizes.shapes, sampler.steps_of(0)):
        digest.update(np.array(part, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _line(
    budget: int, n: int, epochs: int | None, given: _Given, overfit: bool, coupled: str
) -> str:
    text = (
        f"data.token_budget {budget}: {n} micro-batch{'es' * (n > 1)} a step "
        "(trainer.accumulate_grad_batches)"
    )
    if epochs is None:
        text += ", enough for any order of the pairs, since not all epochs can be looked at"
    counted = {
        "overfit_batches" if overfit else "limit_train_batches": given.limit,
        "val_check_interval": given.interval,
    }
    names = [f"trainer.{name} {value}" for name, value in counted.items() if type(value) is int]
    if n > 1 and names:
        text += f"; {' and '.join(names)} count{'s' * (len(names) == 1)} steps"
    if n > 1 and coupled:
        text += f"; {coupled}'s loss of a pair depends on the others of its micro-batch"
    return f"{text}."
