"""Whether two arms can be told apart: Student's t over seeds, and Holm over comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from rotopo.errors import InputError

# What is called significant, and how sure a difference has to be seen that "can be told".
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """The mean difference of two arms over S seeds, whose runs are paired by seed.

    Attributes:
        mean: over seeds.
        interval: 95 %, Student's t with S − 1 degrees of freedom; None of a single seed.
        p: two-sided, of no difference; None of a single seed.
        seeds: S.
        sd: standard deviation of the per-seed differences; None of a single seed.
        smallest: the true difference that so many seeds would have called one, before Holm, in 8 of
            10 comparisons, if differences vary as these do; None of a single seed.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    seeds: int
    sd: float | None
    smallest: float | None

    @classmethod
    def of(cls, differences: np.ndarray) -> "Difference":
        """From per-seed differences [S], S ≥ 1, each a mean over held-out groups.

        Where none differs from the others there is nothing to judge by: p is 1 if all are 0, else
        0, and the interval is the mean alone.
        """
        n, mean = len(differences), float(differences.mean())
        if n == 1:
            return cls(mean, None, None, 1, None, None)
        from scipy import stats

        sd = float(differences.std(ddof=1))
        half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * sd / math.sqrt(n)
        p = float(2 * stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1)) if sd else float(not mean)
        return cls(mean, (mean - half, mean + half), p, n, sd, smallest_difference(n) * sd)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): those at most α are found while all of the family together
    err with at most α, whatever depends on what.

    Args:
        p_values: of one family.

    Returns:
        In the same order.
    """
    n = len(p_values)
    adjusted, most = [0.0] * n, 0.0
    for rank, place in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (n - rank) * p_values[place]))
        adjusted[place] = most
    return adjusted


def power(effect: float, seeds: int, alpha: float = ALPHA) -> float:
    """How often a paired t test finds a true difference.

    Args:
        effect: the difference, in standard deviations of a per-seed difference.
        seeds: at least 2.
        alpha: of the test, two-sided.
    """
    from scipy import integrate, special, stats

    df, shift = seeds - 1, effect * math.sqrt(seeds)
    critical = stats.t.ppf(1 - alpha / 2, df)

    def found(quantile: float) -> float:
        """At this quantile of the standard deviation that is measured. (SciPy's non-central t
        is not a number where the effect is large.)"""
        bound = critical * math.sqrt(2 * special.gammaincinv(df / 2, quantile) / df)
        return float(special.ndtr(shift - bound) + special.ndtr(-shift - bound))

    return float(integrate.quad(found, 0, 1, limit=200)[0])


@cache
def smallest_difference(seeds: int, alpha: float = ALPHA) -> float:
    """The difference that is found with a probability of :data:`POWER`, in standard deviations of
    a per-seed difference.

    Args:
        seeds: how many.
        alpha: of the test, two-sided.

    Raises:
        InputError: fewer than 2 seeds.
    """
    if seeds < 2:
        raise InputError(f"seeds: {seeds} of them vary in nothing: name 2 at least, better 5.")
    from scipy.optimize import brentq

    return float(brentq(lambda effect: power(effect, seeds, alpha) - POWER, 0, 10 / alpha))
