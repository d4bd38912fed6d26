"""How well a model's margins tell flipped labels from clean ones."""

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rotopo.devices import exact
from rotopo.metrics.ranking import auroc
from rotopo.robust.selection import keep, n_kept


def flip_detection(margins: np.ndarray, flipped: np.ndarray, rho: float = 0.2) -> dict[str, float]:
    """What margins say about flips, a low one meaning that the label looks wrong.

    - ``auroc``: the probability that a flipped pair has the lower margin of a flipped and a clean
      one, ties half.
    - ``recall``: with as many pairs called flipped as there are, those of the lowest margins, the
      share of flipped pairs that is among them (which is their precision too).
    - ``precision``: of the share ρ with the lowest margins, which a filter would drop, the share
      that is flipped; without one where ρ·N rounds to none.
    - ``fitted``: the share of flipped pairs whose margin is above zero: whose wrong label the model
      has learnt.

    Args:
        margins: reward of the labelled chosen response less that of the rejected, z for DPO and
            ROPO, of each training pair [N].
        flipped: whether the label was flipped [N].
        rho: ρ, the share that the filter drops.

    Returns:
        the four, by name; without ``precision`` where nothing is dropped. Empty where no pair or
        every pair is flipped.
    """
    flips = int(flipped.sum())
    if flips in (0, len(flipped)):
        return {}
    called = keep(margins, flips)
    found = {
        "auroc": auroc(-margins[flipped], -margins[~flipped]),
        "recall": float(flipped[called].mean()),
        "fitted": float((margins[flipped] > 0).mean()),
    }
    dropped = keep(margins, len(margins) - n_kept(len(margins), rho))
    if dropped.any():
        found["precision"] = float(flipped[dropped].mean())
    return found


class FlipDetection(Metric):
    """:func:`flip_detection` of all training pairs, whatever the batches and the ranks.

    Args:
        rho: ρ, the share that the filter drops.
    """

    full_state_update = False
    table: list[Tensor] | Tensor

    def __init__(self, rho: float = 0.2) -> None:
        super().__init__()
        self.rho = rho
        # One state, so that ranks exchange it at once; float64 holds the places exactly.
        self.add_state("table", [], "cat")
        self.set_dtype(torch.float64)  # of what a rank without pairs contributes

    def update(self, places: Tensor, margins: Tensor, flipped: Tensor) -> None:
        """Add a batch: a number that each pair has to itself, its margin, whether it is flipped,
        each [B]. A pair that comes again counts once."""
        assert isinstance(self.table, list)
        columns = [exact(c.detach()) for c in (places, margins, flipped)]
        self.table.append(torch.stack(columns, 1).flatten())

    def compute(self) -> dict[str, float]:
        """:func:`flip_detection`; empty where there is no pair."""
        whole = dim_zero_cat(self.table) if len(self.table) else torch.empty(0)
        table = whole.reshape(-1, 3).cpu().numpy().astype(np.float64)
        _, first = np.unique(table[:, 0], return_index=True)
        return flip_detection(table[first, 1], table[first, 2] > 0, self.rho)
