"""Metrics over pairs, exact under any batch size and any number of ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class PairMeans(Metric):
    """Means over pairs of several named values.

    Sums and the count are kept in float64 and added over ranks, so that neither the split into
    batches nor a smaller last batch counts.

    Args:
        names: the values' names.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add a batch: each value [B], one entry per name."""
        stacked = torch.stack([values[name].double() for name in self.names])
        self.sums += stacked.sum(1)
        self.count += stacked.shape[1]

    def compute(self) -> dict[str, Tensor]:
        means = self.sums / self.count
        return dict(zip(self.names, means, strict=True))
