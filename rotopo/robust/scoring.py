"""Losses and rewards of training pairs under the model as it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rotopo.data.rows import Rows, unpaired_rows
from rotopo.data.sampler import EvalSampler
from rotopo.devices import exact
from rotopo.errors import InputError
from rotopo.models.modes import evaluating
from rotopo.models.outcome import PairOutcome
from rotopo.progress import Progress
from rotopo.run.lightning import data_of, is_hidden


@dataclass(frozen=True)
class Scores:
    """Of N rows, in their order.

    Attributes:
        losses: the objective's [N].
        chosen, rejected: rewards [N].
    """

    losses: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """The chosen's reward less the rejected's [N]."""
        return self.chosen - self.rejected


def score(trainer: Trainer, rows: Rows, description: str) -> Scores:
    """Scores of all rows, on all ranks; arguments as of :func:`scored`."""
    # Losses, rewards, and how often a row came: more than once where rows are fewer than ranks.
    table = torch.zeros(len(rows), 4, dtype=torch.float64)
    for places, values in scored(trainer, rows, description):
        here = torch.cat([values, torch.ones(len(values), 1)], 1)
        table.index_add_(0, places, here)
    if trainer.world_size > 1:
        table = table.to(trainer.strategy.root_device)
        table = trainer.strategy.reduce(table, reduce_op="sum").cpu()
    losses, chosen, rejected = (table[:, :3] / table[:, 3:]).numpy().T
    return Scores(losses, chosen, rejected)


@torch.no_grad()
def scored(trainer: Trainer, rows: Rows, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, this rank's rows and their scores, without dropout.

    Through the validation step: so it is the one log-prob path, under any strategy, and with a
    cached reference it costs one forward pass.

    Args:
        trainer: while it runs.
        rows: of any pairs.
        description: of the loop, as it is shown.

    Yields:
        places of the rows [B], and their loss and the rewards of chosen and rejected, float64 on
        the CPU [B, 3].
    """
    data = data_of(trainer)
    loader = data.batches(rows, range(len(rows)))
    sampler = loader.batch_sampler
    assert isinstance(sampler, EvalSampler)
    bar = Progress(loader, description, hidden=is_hidden(trainer))
    with evaluating(trainer.lightning_module):
        for number, batch in enumerate(bar):
            batch = trainer.strategy.batch_to_device(batch)
            output: Any = trainer.strategy.validation_step(batch, number)
            pairs: PairOutcome = output["pairs"]
            values = torch.stack([pairs.losses, pairs.chosen, pairs.rejected], 1)
            places = torch.tensor(sampler.batches[number])
            # Behind the last row stands the first again, where rows are fewer than ranks.
            yield places.where(places < len(rows), 0), exact(values).cpu()


def require_pairs(rows: Rows, who: str) -> None:
    """Refuse unpaired rows, whose losses and rewards are those of one response.

    Raises:
        InputError: a row has one response only.
    """
    single = unpaired_rows(rows.pairs)
    if single:
        raise InputError(
            f"{who} compares pairs by their losses and margins, but {single} of {len(rows)} "
            "training rows have one response: it needs pairs."
        )
