"""What is exported, and the rows of the run's data on which it is compared."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rotopo.data.batch import TokenizedRow
from rotopo.data.module import PairwiseDataModule
from rotopo.data.schemas import Preference
from rotopo.models.settings import BackboneConfig
from rotopo.training import PairwiseModule

Form = Literal["merged", "adapter"]
Kind = Literal["merged", "adapter", "reward"]  # the first two of a policy
Dtype = Literal["float32", "bfloat16", "float16", "float64"]

# Positions compared in each response; all logits of all of them would fill the memory.
_POSITIONS = 16


@dataclass(frozen=True)
class Probe:
    """A row of the run's data: its tokens as in training, and the same as messages."""

    row: TokenizedRow
    preference: Preference

    def positions(self) -> list[Tensor]:
        """Which tokens of each response to compare the predictions of."""
        return [
            torch.linspace(0, len(ids) - 1, min(len(ids), _POSITIONS)).round().long()
            for ids in self.row.responses
        ]


@dataclass(frozen=True)
class Job:
    """What is exported.

    Attributes:
        given: settings of the policy or of the reward model's backbone.
        config: the same with what their path names: its base's path, and the adapter that trained.
        split: which the probes are from.
        wide: the dtype to compute in.
        written: the dtype of merged weights.
    """

    module: PairwiseModule
    data: PairwiseDataModule
    kind: Kind
    given: BackboneConfig
    config: BackboneConfig
    split: str
    probes: list[Probe]
    wide: torch.dtype
    written: torch.dtype


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of a name; None of ``auto`` and of no name."""
    return None if name in (None, "auto") else getattr(torch, str(name))


def probes_of(data: PairwiseDataModule, prompts: int) -> tuple[str, list[Probe]]:
    """The first rows of the test split with different prompts; of the validation split where there
    is no test, and of the training pairs where there is neither."""
    split = next(name for name in ("test", "validation", "train") if data.has(name))
    rows = data.rows(split)
    found: dict[tuple[int, ...], Probe] = {}
    for row in map(rows.__getitem__, range(len(rows))):
        if len(found) == prompts:
            break
        if tuple(row.prompt) not in found:
            found[tuple(row.prompt)] = Probe(row, data.pairs.preference(split, row.row))
    return split, list(found.values())
