"""Means over pairs, exact under any batch size and any number of ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from rotopo.devices import exact


class PairMeans(Metric):
    """Means over pairs of several named values.

    Sums and counts are kept in float64 and added over ranks, so that neither the split into
    batches nor a smaller last batch counts. Unpaired rows have some of the values only, so each
    has its own count.

    Args:
        names: the values' names.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), "sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), "sum")

    def update(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch: for each name its values [B], and which rows have one [B]."""
        pairs = [values[name] for name in self.names]
        self.sums += torch.stack([exact(torch.where(has, v, 0)).sum() for v, has in pairs])
        self.counts += torch.stack([has.sum() for _, has in pairs]).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """The means of the values that any row had."""
        means = (self.sums / self.counts).unbind()
        present = (self.counts > 0).tolist()
        return {n: m for n, m, p in zip(self.names, means, present, strict=True) if p}
