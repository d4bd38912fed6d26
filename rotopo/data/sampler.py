"""Which pairs go through the model together: batches by length, steps of exactly G pairs.

The token budget, the accumulation and the number of ranks change memory and speed, never the
numbers: an optimiser step is G pairs chosen by the seed and the epoch alone, and only then cut
into accumulation × ranks micro-batches of near-equal size.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from rotopo.data.batch import Layout, Sizes
from rotopo.data.budget import parts_needed
from rotopo.data.mixture import SourceMixture
from rotopo.errors import InputError

# Tokens of the prompt, and of each response.
PairLength = tuple[int, Sequence[int]]


class StepSampler(Sampler[list[int]]):
    """Micro-batches of one rank, ``accumulation`` of them for each optimiser step.

    Every epoch is a fresh permutation of the pairs, or what a mixture takes of its sources, cut
    into steps of ``pairs_per_step``; the remainder of fewer than that sits the epoch out (another
    one each time).

    Args:
        lengths: lengths of each pair, see :data:`PairLength`.
        pairs_per_step: G, the pairs of one optimiser step over all ranks.
        accumulation: micro-batches of one rank per step.
        world_size: number of ranks.
        rank: this rank.
        seed: seed of the permutations.
        token_budget: tokens of one micro-batch at most, padding included; None for no limit.
        layout: the batch layout, which decides what a pair costs.
        length_window: sort the pairs of so many steps by length before they are cut into steps,
            and put these steps in random order.
        mixture: of the pairs' sources; None for an epoch that has each pair once.

    Raises:
        InputError: fewer pairs than one step takes, fewer pairs in a step than micro-batches, or
            a pair over the token budget; and, when an epoch begins, a micro-batch over the token
            budget, with the accumulation that would fit.
    """

    def __init__(
        self,
        lengths: Sequence[PairLength],
        pairs_per_step: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        token_budget: int | None,
        layout: Layout,
        length_window: int = 1,
        mixture: SourceMixture | None = None,
    ) -> None:
        self.sizes = Sizes(lengths, layout)
        self.mixture = mixture
        # Pairs of an epoch, before the remainder is left out.
        self.pairs = len(lengths) if mixture is None else sum(mixture.counts)
        if self.pairs < pairs_per_step:
            what = "the training split holds" if mixture is None else "an epoch of the mixture has"
            raise InputError(
                f"data.pairs_per_step is {pairs_per_step}, but {what} only {self.pairs} pairs: "
                "lower it or add pairs."
            )
        if pairs_per_step < accumulation * world_size:
            raise InputError(
                f"data.pairs_per_step is {pairs_per_step}: too few to give each of "
                f"{accumulation} (trainer.accumulate_grad_batches) × {world_size} (ranks) "
                "micro-batches a pair."
            )
        largest = max(self.sizes.tokens([i]) for i in range(len(lengths)))
        if token_budget is not None and largest > token_budget:
            raise InputError(
                f"data.token_budget is {token_budget}, but one pair alone takes {largest} tokens: "
                "raise it, or lower data.max_length."
            )
        self.pairs_per_step = pairs_per_step
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.token_budget = token_budget
        self.length_window = length_window
        self.epoch = 0
        self.same_epoch = False  # whether all epochs are the first, for trainer.overfit_batches
        self.skip = 0  # micro-batches that the next epoch leaves out, see StatefulLoader

    @property
    def sampler(self) -> "StepSampler":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return self.pairs // self.pairs_per_step

    @property
    def tokens_per_step(self) -> float:
        """Of all ranks together, on average, without what fills lines up between pairs."""
        tokens = sum(self.sizes.tokens([i]) for i in self._order(0, torch.Generator()))
        return self.pairs_per_step * tokens / self.pairs

    def _order(self, epoch: int, generator: torch.Generator) -> list[int]:
        """The pairs of an epoch."""
        if self.mixture is not None:
            return self.mixture.epoch(self.seed, epoch)
        return torch.randperm(len(self.sizes), generator=generator).tolist()

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def steps_of(self, epoch: int) -> list[list[int]]:
        """The pairs of each optimiser step of an epoch [steps, G]."""
        epoch = 0 if self.same_epoch else epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = self._order(epoch, generator)
        G = self.pairs_per_step
        order = order[: self.steps * G]
        if self.length_window > 1:
            W = self.length_window * G
            windows = [order[start : start + W] for start in range(0, len(order), W)]
            order = [i for window in windows for i in self.sizes.longest_first(window)]
        steps = [order[step * G : (step + 1) * G] for step in range(self.steps)]
        if self.length_window > 1:
            shuffled = torch.randperm(len(steps), generator=generator).tolist()
            steps = [steps[i] for i in shuffled]
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        steps = self.steps_of(self.epoch)
        self._check_budget(steps)  # all of them now, rather than hours into the epoch
        for step in range(skip // self.accumulation, self.steps):
            parts = self._split(steps[step])
            start = skip % self.accumulation if step == skip // self.accumulation else 0
            for turn in range(start, self.accumulation):
                yield parts[turn * self.world_size + self.rank]

    def _check_budget(self, steps: list[list[int]]) -> None:
        if self.token_budget is None:
            return
        needed = -(-parts_needed(self.sizes, steps, self.token_budget) // self.world_size)
        if needed > self.accumulation:
            raise InputError(
                f"A micro-batch would be over data.token_budget ({self.token_budget}): raise it, "
                f"set trainer.accumulate_grad_batches to {needed} or more, or lower "
                "data.max_length."
            )

    def _split(self, pairs: list[int]) -> list[list[int]]:
        """Cut one step into micro-batches whose padded sizes are near-equal, largest first."""
        n_parts = self.accumulation * self.world_size
        sizes = self.sizes
        pairs = sizes.longest_first(pairs)
        low = max(sizes.tokens([i]) for i in pairs)
        high = sizes.tokens(pairs)
        while low < high:  # the smallest bound under which contiguous parts suffice
            middle = (low + high) // 2
            if len(sizes.cut(pairs, middle)) <= n_parts:
                high = middle
            else:
                low = middle + 1
        parts = sizes.cut(pairs, low)
        while len(parts) < n_parts:
            widest = max((p for p in parts if len(p) > 1), key=sizes.tokens)
            at = parts.index(widest)
            half = len(widest) // 2
            parts[at : at + 1] = [widest[:half], widest[half:]]
        # Ranks that work at the same time get neighbours in size.
        return sorted(parts, key=sizes.tokens, reverse=True)


class EvalSampler(Sampler[list[int]]):
    """Every pair exactly once over all ranks, in batches of similar lengths, longest first.

    All ranks get the same number of batches, so that none waits for another in a collective.

    Args:
        lengths: lengths of each pair, see :data:`PairLength`.
        token_budget: tokens of a batch at most, padding included; None for no limit.
        pairs_per_batch: pairs of a batch at most.
        world_size: number of ranks.
        rank: this rank.
        layout: the batch layout.
        is_trial: asked whenever the batches are; if so the first of them is the longest pair alone.

    Raises:
        InputError: fewer pairs than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[PairLength],
        token_budget: int | None,
        pairs_per_batch: int,
        world_size: int,
        rank: int,
        layout: Layout,
        is_trial: Callable[[], bool] = bool,
    ) -> None:
        if len(lengths) < world_size:
            raise InputError(f"{len(lengths)} pairs to evaluate on {world_size} ranks: too few.")
        sizes = Sizes(lengths, layout)
        order = sizes.longest_first(range(len(lengths)))
        budget = token_budget if token_budget is not None else sizes.tokens(order)
        batches = [
            part[start : start + pairs_per_batch]
            for part in sizes.cut(order, budget)
            for start in range(0, len(part), pairs_per_batch)
        ]
        missing = -len(batches) % world_size
        if len(batches) + missing <= len(order):
            for _ in range(missing):
                widest = max(batches, key=len)
                at, half = batches.index(widest), len(widest) // 2
                batches[at : at + 1] = [widest[:half], widest[half:]]
        else:  # too few pairs to split further: the shortest share a batch instead
            for _ in range(len(batches) % world_size):
                batches[-2:] = [batches[-2] + batches[-1]]
        self.batches = batches[rank::world_size]
        self.is_trial = is_trial

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        if self.is_trial():
            return chain([self.batches[0][:1]], self.batches[1:])
        return iter(self.batches)


class StatefulLoader(DataLoader):
    """A DataLoader that resumes in the middle of an epoch.

    Lightning saves and restores what ``state_dict`` returns. The state counts the batches handed
    out, not those that workers have prefetched, and the workers' seeds come from a generator of
    its own, so that iterating leaves the global random state alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["generator"] = torch.Generator().manual_seed(0)
        super().__init__(*args, **kwargs)
        self._consumed = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._consumed = self.batch_sampler.skip  # type: ignore[union-attr]
        for batch in super().__iter__():
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        # A finished epoch is the beginning of the next one.
        return {"batches": self._consumed % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.skip = state["batches"]  # type: ignore[union-attr]
