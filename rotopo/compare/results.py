"""What came of a comparison: the rates that were chosen, the levels, and every difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rotopo.compare.curves import Points
from rotopo.compare.differences import ALPHA, Difference, holm
from rotopo.compare.frontiers import PairOfRuns, levels, pair_of_runs
from rotopo.compare.settings import Choice
from rotopo.errors import InputError

# What arms are equal in where they are compared.
# Outcomes of which more is better; of the others it depends on what one wants.
JUDGED = ("accuracy", "margin", "score")
AXES = {"kl": "√KL(π_θ ‖ π_ref), √nats", "margin": "margin h, nats"}


@dataclass(frozen=True)
class Try:
    """A tuning run.

    Attributes:
        arm, rate: whose it is.
        best: the outcome that rates are chosen by, at its best point within the cap; None where
            there is no such point.
        step: that point's.
        kl: KL(π_θ ‖ π_ref) there, nats a response.
        chosen: whether it is the arm's best.
    """

    arm: str
    rate: float
    best: float | None
    step: int | None
    kl: float | None
    chosen: bool = False


def tried(arm: str, rate: float, points: Points, choice: Choice) -> Try:
    """How good a rate is: the best point, after the start, within the cap."""
    kl = points.means("reverse_kl")
    outcome = points.means(choice.best)
    within = [
        n
        for n in range(len(outcome))
        if points.steps[n] and (choice.kl_cap is None or kl[n] <= choice.kl_cap)
    ]
    if not within:
        return Try(arm, rate, None, None, None)
    best = max(within, key=lambda n: outcome[n])
    return Try(arm, rate, float(outcome[best]), points.steps[best], float(kl[best]))


def chosen_rate(tries: Sequence[Try], cap: float | None) -> float:
    """The rate of the best try; of equal ones the first.

    Raises:
        InputError: none has a point within the cap.
    """
    good = [one for one in tries if one.best is not None]
    if not good:
        raise InputError(
            f"choose.kl_cap is {cap}: no point of {tries[0].arm} lies within it. Try lower rates, "
            "measure at more points, or raise it."
        )
    return max(good, key=lambda one: one.best or 0.0).rate


@dataclass(frozen=True)
class Row:
    """An arm beside the first at one level.

    Attributes:
        axis: in what both are equal, one of :data:`AXES`.
        level: the distance.
        quarter: which of the levels it is, from 1.
        outcome: one of :data:`rotopo.compare.settings.OUTCOMES`.
        arm, against: whose outcome less whose.
        reached: seeds of which both runs have been that far.
        seeds: all.
        difference: over the seeds; None unless all have been that far.
        p_holm: adjusted, in the family of this outcome; None where there is no p.
        pairs: of each seed the two runs beside each other.
    """

    axis: str
    level: float
    quarter: int
    outcome: str
    arm: str
    against: str
    reached: int
    seeds: int
    difference: Difference | None
    p_holm: float | None
    pairs: list[PairOfRuns]

    @property
    def place(self) -> str:
        """Where the arms are compared, in words."""
        return f"{'√KL' if self.axis == 'kl' else 'margin'} of {self.level:.3g}"

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.difference is None:
            return f"not reached ({self.reached} of {self.seeds} seeds)"
        if self.p_holm is None or self.p_holm > ALPHA:
            return "not told apart"
        more = self.difference.mean > 0
        if self.outcome in JUDGED:
            return "ahead" if more else "behind"
        return "higher" if more else "lower"


@dataclass(frozen=True)
class Results:
    """Everything that the page shows.

    Attributes:
        tries: all tuning runs.
        rates: of each arm, the chosen one.
        levels: by axis.
        rows: every comparison.
        runs: of each arm, the points of its runs by seed.
    """

    tries: list[Try]
    rates: dict[str, float]
    levels: dict[str, list[float]]
    rows: list[Row]
    runs: dict[str, dict[int, Points]]


def compared(
    tries: list[Try],
    tuning: Mapping[str, Points],
    runs: dict[str, dict[int, Points]],
    outcomes: Sequence[str],
) -> Results:
    """Every arm beside the first, at every level.

    Args:
        tries: of all arms and rates, with those chosen marked.
        tuning: the tuning run at each arm's chosen rate, by which the levels are fixed.
        runs: of each arm its runs by seed.
        outcomes: what is compared, of :data:`~rotopo.compare.settings.OUTCOMES`.
    """
    at = {
        axis: levels([run.measured("margin", axis).frontier().distance for run in tuning.values()])
        for axis in AXES
    }
    rows = []
    for outcome in outcomes:
        family = [
            row for axis in AXES if axis != outcome for row in _rows(axis, at[axis], outcome, runs)
        ]
        rows += _adjusted(family)
    rates = {one.arm: one.rate for one in tries if one.chosen}
    return Results(tries, rates, at, rows, runs)


def _rows(
    axis: str, at: list[float], outcome: str, runs: dict[str, dict[int, Points]]
) -> list[Row]:
    first, *others = runs
    rows = []
    for arm in others:
        by_seed = [
            pair_of_runs(run.measured(outcome, axis), runs[first][seed].measured(outcome, axis), at)
            for seed, run in runs[arm].items()
        ]
        for place, level in enumerate(at):
            pairs = [pairs[place] for pairs in by_seed]
            values = np.array([pair.difference for pair in pairs])
            reached = int((~np.isnan(values)).sum())
            found = Difference.of(values) if reached == len(values) else None
            seeds = len(values)
            rows.append(
                Row(axis, level, place + 1, outcome, arm, first, reached, seeds, found, None, pairs)
            )
    return rows


def _adjusted(family: list[Row]) -> list[Row]:
    """With p values adjusted for all of them together."""
    known = [row.difference.p for row in family if row.difference and row.difference.p is not None]
    adjusted = iter(holm(known))
    made = []
    for row in family:
        p = next(adjusted) if row.difference and row.difference.p is not None else None
        made.append(Row(**{**vars(row), "p_holm": p}))
    return made


def as_table(results: Results) -> list[dict[str, Any]]:
    """The comparisons as rows of ``comparison.csv``."""
    table = []
    for row in results.rows:
        found = row.difference
        low, high = found.interval if found and found.interval else (None, None)
        table.append(
            {
                "at_equal": row.axis,
                "level": row.level,
                "outcome": row.outcome,
                "arm": row.arm,
                "against": row.against,
                "difference": found and found.mean,
                "low": low,
                "high": high,
                "p": found and found.p,
                "p_holm": row.p_holm,
                "seeds": row.seeds,
                "seeds_reached": row.reached,
                "smallest_difference": found and found.smallest,
                "verdict": row.verdict,
            }
        )
    return table
