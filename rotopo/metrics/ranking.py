"""How values order what they score: AUROC, ranks and correlation."""

import numpy as np


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that one of the positive values [n] is above one of the negative [m], ties
    half (Mann and Whitney)."""
    n, m = len(positive), len(negative)
    rank_sum = mean_ranks(np.concatenate([positive, negative]))[:n].sum()
    return float((rank_sum - n * (n + 1) / 2) / (n * m))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one of the two has a single value only."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
