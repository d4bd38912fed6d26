"""Calibration of the Bradley-Terry model, which takes σ(r_w − r_l) for the label's probability."""

import numpy as np

CALIBRATION_BINS = 15


def binned(margin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How sure rewards are of pairs, and whether they are right.

    Args:
        margin: the chosen response's reward less the rejected's [n].

    Returns:
        Each pair's confidence max(p, 1 − p), with p = σ(margin) [n]; 1 where the chosen response
        has the larger reward, 0 where the rejected has, one half for a tie [n]; and which of
        ``CALIBRATION_BINS`` equal bins from one half to one the confidence lies in [n].
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (1 + np.sign(margin)) / 2
    bins = np.minimum((2 * confidence - 1) * CALIBRATION_BINS, CALIBRATION_BINS - 1)
    return confidence, right, bins.astype(int)


def calibration_error(margin: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017) over the bins of :func:`binned`.

    Args:
        margin: as there [n], n ≥ 1.
    """
    confidence, right, bins = binned(margin)
    gaps = np.bincount(bins, right - confidence)
    return float(np.abs(gaps).sum() / len(margin))
