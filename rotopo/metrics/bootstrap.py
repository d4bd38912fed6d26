"""Intervals by resampling."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

# Draws whose indices exist at once.
_DRAWS = 2**22


def mean_interval(
    values: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    An accuracy, a win rate and a mean difference of paired scores are all means of one value per
    pair or prompt, so this is the interval of each of them, and pairing is in the values.

    Args:
        values: [n], n ≥ 1.
        clusters: what each value belongs to [n], where values that belong together (pairs on the
            same film, say) are not independent: whole clusters are drawn. None draws values.
        level: the share of resampled means inside.
        resamples: how many means.
        seed: seed of the draws; the same values in the same order have the same interval.
    """
    sums, sizes = np.asarray(values, dtype=float), np.ones(len(values))
    if clusters is not None:
        names: dict[Hashable, int] = {}
        places = [names.setdefault(name, len(names)) for name in clusters]
        sums, sizes = np.bincount(places, sums), np.bincount(places).astype(float)
    return percentile_interval(
        np.concatenate(
            [
                sums[drawn].sum(1) / sizes[drawn].sum(1)
                for drawn in draws(len(sums), resamples, seed)
            ]
        ),
        level,
    )


def draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """n of n indices with replacement, ``resamples`` times, in blocks [*, n] of bounded size."""
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWS // n)
    for start in range(0, resamples, step):
        yield generator.integers(n, size=(min(step, resamples - start), n))


def percentile_interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """The ends that leave (1 - ``level``)/2 of the resampled values [resamples] on each side."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
