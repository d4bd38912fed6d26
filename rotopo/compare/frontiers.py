"""A run's outcome by its distance from the reference, read off at fixed distances."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rotopo.metrics.bootstrap import draws, percentile_interval


@dataclass(frozen=True)
class Frontier:
    """Outcomes at P distances, each farther than the ones before.

    Of a run's points only those count at which it is farther from the reference than ever before:
    the running maximum of the distance. A run that turns back is judged by what it was on the way
    out [ours].

    Attributes:
        distance: √KL(π_θ ‖ π_ref) or a margin, increasing [P].
        outcome: at that distance [P].
    """

    distance: np.ndarray
    outcome: np.ndarray

    @classmethod
    def of(cls, distance: np.ndarray, outcome: np.ndarray) -> "Frontier":
        """From a run's points in the order of its training, each [N], N ≥ 1."""
        before = np.maximum.accumulate(np.concatenate([[-np.inf], distance[:-1]]))
        farther = distance > before
        return cls(distance[farther], outcome[farther])

    def at(self, level: float) -> float:
        """The outcome at a distance, linear between two points; not a number where the run has not
        been that far, or began farther: nothing is extrapolated."""
        if not len(self.distance):  # a resample without any of the responses
            return math.nan
        return float(np.interp(level, self.distance, self.outcome, np.nan, np.nan))


def levels(distances: Iterable[np.ndarray], parts: int = 4) -> list[float]:
    """Distances at which arms are compared: those that divide in equal parts the range that all
    runs reach. Of quarters three.

    Args:
        distances: of each run at its points [N].
        parts: at least 2.

    Returns:
        ``parts`` − 1 distances, increasing; none where the runs have no range in common.
    """
    found = list(distances)
    low = max(float(one.min()) for one in found)
    high = min(float(one.max()) for one in found)
    if not high > low:
        return []
    return [low + (high - low) * part / parts for part in range(1, parts)]


@dataclass(frozen=True)
class Measured:
    """What is measured of a run at N points, by group: the prompts that belong together.

    Of a group the sums over its responses or pairs and how many they are, so that every mean is
    that over responses or pairs.

    Attributes:
        distance_sums: of the distance [N, G]; for √KL those of the KL.
        distance_counts: responses or pairs of each group [G].
        outcome_sums, outcome_counts: of the outcome [N, G] and [G].
        root: whether the distance is the root of the mean: √KL.
    """

    distance_sums: np.ndarray
    distance_counts: np.ndarray
    outcome_sums: np.ndarray
    outcome_counts: np.ndarray
    root: bool = True

    def frontier(self, groups: np.ndarray | slice = slice(None)) -> Frontier:
        """Of these groups, which may be drawn more than once; of all."""
        distance = _mean(self.distance_sums, self.distance_counts, groups)
        if self.root:
            distance = np.sqrt(np.maximum(distance, 0))
        return Frontier.of(distance, _mean(self.outcome_sums, self.outcome_counts, groups))


def _mean(sums: np.ndarray, counts: np.ndarray, groups: np.ndarray | slice) -> np.ndarray:
    count = counts[groups].sum()
    return sums[:, groups].sum(1) / count if count else np.full(len(sums), np.nan)


@dataclass(frozen=True)
class PairOfRuns:
    """Two runs beside each other at one distance.

    Attributes:
        difference: of the outcomes; not a number where one has not been that far.
        interval: 95 %, over groups of prompts alone: how much another held-out set would change it,
            for these two runs and not for others of the same settings. None where fewer than half
            of the resamples reach the level.
        reached: the share of resamples in which both have been that far.
    """

    difference: float
    interval: tuple[float, float] | None
    reached: float


def pair_of_runs(
    one: Measured, other: Measured, levels: Sequence[float], resamples: int = 2000, seed: int = 0
) -> list[PairOfRuns]:
    """The first run's outcome less the second's at each level, with the bootstrap's interval.

    Groups are drawn, the same for both runs, for the distance and the outcome, and for all points:
    so the distance's own error is in the interval.

    Args:
        one, other: of the same groups.
        levels: distances.
        resamples: how many.
        seed: of the draws.
    """

    def differences(groups: np.ndarray | slice) -> list[float]:
        ours, theirs = one.frontier(groups), other.frontier(groups)
        return [ours.at(level) - theirs.at(level) for level in levels]

    n = len(one.distance_counts)
    drawn = [differences(groups) for block in draws(n, resamples, seed) for groups in block]
    table = np.array(drawn).reshape(resamples, len(levels))
    found = []
    for number, difference in enumerate(differences(slice(None))):
        values = table[:, number]
        reached = values[~np.isnan(values)]
        enough = 2 * len(reached) >= resamples
        interval = percentile_interval(reached, 0.95) if enough else None
        found.append(PairOfRuns(difference, interval, len(reached) / resamples))
    return found
