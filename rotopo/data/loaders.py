"""Rows -> loaders: which rows are a batch, on which rank, and how a batch is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Subset

from rotopo.data.batch import (
    Layout,
    PairBatch,
    PromptBatch,
    TokenizedRow,
    collate,
    collate_prompts,
)
from rotopo.data.mixture import SourceMixture
from rotopo.data.rows import Rows
from rotopo.data.sampler import EvalSampler, PairLength, StatefulLoader, StepSampler
from rotopo.data.settings import at_least, one_of, seed_in_range
from rotopo.errors import InputError, at_once


@dataclass(frozen=True)
class Batching:
    """How rows become batches, as :class:`rotopo.data.module.PairwiseDataModule` has it.

    Raises:
        InputError: a setting out of its range.
    """

    layout: Layout
    token_budget: int | None
    pairs_per_step: int
    eval_pairs_per_batch: int
    length_window: int
    num_workers: int | None
    seed: int

    def __post_init__(self) -> None:
        with at_once() as check:
            check(one_of, "layout", self.layout, Layout)
            for name in ("pairs_per_step", "eval_pairs_per_batch", "token_budget", "length_window"):
                check(at_least, name, getattr(self, name), 1)
            check(at_least, "num_workers", self.num_workers, 0)
            check(seed_in_range, "seed", self.seed)


# Says how many micro-batches a step of a sampler's has on each rank.
Accumulate = Callable[[StepSampler], int]


@dataclass(frozen=True)
class Loaders:
    """Makes loaders.

    Attributes:
        settings: how rows become batches.
        pad_id: the token that fills up batches.
        world_size, rank: how many ranks share the rows, and which of them this is.
        accumulation: micro-batches of an optimiser step on each rank.
        on_gpu: whether batches go to a GPU.
        overfit: whether every epoch trains on the same batches.
        is_trial: whether an evaluation is only to see that it works, and its memory is no matter.
    """

    settings: Batching
    pad_id: int
    world_size: int = 1
    rank: int = 0
    accumulation: int = 1
    on_gpu: bool = False
    overfit: bool = False
    is_trial: Callable[[], bool] = bool

    @classmethod
    def of(cls, settings: Batching, pad_id: int, trainer: Trainer | None) -> "Loaders":
        """Loaders for a Trainer's ranks and device; for one process where there is none."""
        if trainer is None:
            return cls(settings, pad_id)
        device = trainer.strategy.root_device.type
        return cls(
            settings,
            pad_id,
            trainer.world_size,
            trainer.global_rank,
            trainer.accumulate_grad_batches,
            device == "cuda",
            bool(trainer.overfit_batches),  # type: ignore[attr-defined]
            # A processor takes seconds for a batch, and a batch does not fill its memory.
            lambda: device == "cpu" and trainer.sanity_checking,
        )

    def training(
        self, rows: Rows, mixture: SourceMixture | None, accumulate: Accumulate | None = None
    ) -> StatefulLoader:
        """Optimiser steps of exactly ``pairs_per_step`` rows over all ranks.

        Args:
            rows: to train on.
            mixture: of their sources; None for an epoch that has each of them once.
            accumulate: asked once it is known what the steps are; None leaves ``accumulation``.
        """
        sampler = StepSampler(
            rows.lengths(),
            self.settings.pairs_per_step,
            self.accumulation,
            self.world_size,
            self.rank,
            self.settings.seed,
            self.settings.token_budget,
            self.settings.layout,
            self.settings.length_window,
            mixture,
        )
        sampler.same_epoch = self.overfit
        if accumulate is not None:
            sampler.accumulation = accumulate(sampler)
        scale = sampler.accumulation * self.world_size / self.settings.pairs_per_step
        made = partial(collate, pad_id=self.pad_id, layout=self.settings.layout, loss_scale=scale)
        return StatefulLoader(
            rows, batch_sampler=sampler, collate_fn=made, **self._beside_the_step()
        )

    def evaluation(self, rows: Rows) -> DataLoader:
        """All rows, those of similar lengths together."""
        return self._in_similar_lengths(rows, rows.lengths())

    def some(self, rows: Rows, places: Sequence[int]) -> DataLoader:
        """Some rows, each once over all ranks, in as many batches on each rank.

        Where they are fewer than ranks, the first comes again. The loader's
        ``batch_sampler.batches`` say which of the places are in each of this rank's batches; one
        that comes again has a number of its own, after the last.

        Args:
            rows: the rows.
            places: which of them.
        """
        places = [*places, *list(places[:1]) * (self.world_size - len(places))]
        lengths = rows.lengths()
        return self._in_similar_lengths(Subset(rows, places), [lengths[place] for place in places])

    def prediction(self, rows: Rows, responses: bool) -> DataLoader:
        """All rows, the longest first, in batches of ``eval_pairs_per_batch``.

        Args:
            rows: prompts to respond to, or rows with a response each.
            responses: whether they have one.

        Raises:
            InputError: there are fewer rows than ranks.
        """
        make: Callable[[list[TokenizedRow]], Any] = partial(_collate_prompts, pad_id=self.pad_id)
        if responses:
            make = partial(_collate_mean, pad_id=self.pad_id, layout=self.settings.layout)
        if len(rows) < self.world_size:
            raise InputError(
                f"{len(rows)} rows to predict on {self.world_size} ranks: lower trainer.devices."
            )
        sizes = [prompt + (sum(each) if responses else 0) for prompt, each in rows.lengths()]
        order = sorted(range(len(rows)), key=lambda i: sizes[i], reverse=True)
        mine = order[self.rank :: self.world_size]
        # As many on every rank, since none may wait for another: the shortest comes once more.
        mine += mine[-1:] * (-(-len(order) // self.world_size) - len(mine))
        # By batch size, since Lightning rebuilds the batch sampler of a prediction.
        return DataLoader(
            Subset(rows, mine),
            batch_size=self.settings.eval_pairs_per_batch,
            collate_fn=make,
            **self._beside_the_step(),
        )

    def _in_similar_lengths(
        self, rows: Rows | Subset[TokenizedRow], lengths: Sequence[PairLength]
    ) -> DataLoader:
        sampler = EvalSampler(
            lengths,
            self.settings.token_budget,
            self.settings.eval_pairs_per_batch,
            self.world_size,
            self.rank,
            self.settings.layout,
            self.is_trial,
        )
        return DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=partial(_collate_mean, pad_id=self.pad_id, layout=self.settings.layout),
            **self._beside_the_step(),
            # Iterating draws a seed: from here, so that evaluation leaves training's alone.
            generator=torch.Generator(),
        )

    def _beside_the_step(self) -> dict[str, Any]:
        """What all loaders share: batches are made and copied while the device computes."""
        default = 2 if self.on_gpu else 0
        workers = default if self.settings.num_workers is None else self.settings.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": self.on_gpu,
        }


def _collate_mean(rows: list[TokenizedRow], pad_id: int, layout: Layout) -> PairBatch:
    """A batch whose loss is the mean over its pairs."""
    return collate(rows, pad_id, layout, loss_scale=1 / len(rows))


def _collate_prompts(rows: list[TokenizedRow], pad_id: int) -> PromptBatch:
    return collate_prompts([row.prompt for row in rows], pad_id, [row.row for row in rows])
