"""``rotopo compare``: is A better than B, at an equal distance from the reference?"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from rotopo.compare.curves import Points
from rotopo.compare.differences import smallest_difference
from rotopo.compare.page import page
from rotopo.compare.results import Try, as_table, chosen_rate, compared, tried
from rotopo.compare.runs import Run, Runs
from rotopo.compare.settings import OUTCOMES, Arm, Choice, Comparison, Measures, Settings
from rotopo.errors import InputError
from rotopo.files import write_whole


def compare(
    base: list[Path],
    arms: dict[str, Arm],
    rates: list[float],
    seeds: list[int],
    output: Path,
    settings: Settings | None = None,
    tuning_seed: int = 0,
    outcome: str = "accuracy",
    choose: Choice = Choice(),  # noqa: B008 (frozen)
    measure: Measures = Measures(),  # noqa: B008 (frozen)
    at_once: int = 1,
    dry_run: bool = False,
) -> None:
    """Train arms alike, and say whether they can be told apart at an equal distance.

    First every arm with every rate, on the tuning seed, measured on the validation split: so each
    arm's rate is chosen. Then every arm with every seed at its rate, measured on the test split.
    Runs are known by the hash of their settings: none is done twice, and a comparison that was
    killed goes on. A source of pairs is known by its name: where its content changes, take another
    output. The page says who is ahead of the first arm, behind it, or not told apart, at
    equal sequence KL and at equal margin; ``comparison.csv`` beside it has every number.

    Args:
        base: files for rotopo fit, in their order: everything that the arms share.
        arms: by name, with what is laid over the base in each: {SimPO: {settings: {model:
            {class_path: SimPO}}}}. The first is the one that the others are compared with.
        rates: learning rates to try with every arm.
        seeds: of the runs that are compared.
        output: folder of the runs, the page and the tables.
        settings: of all arms, laid over the base as another file is.
        tuning_seed: of the runs that choose a rate.
        outcome: what the arms are compared by in the first place: accuracy, margin, score ...
        choose: how a rate is chosen.
        measure: what is measured, and at how many points.
        at_once: runs side by side.
        dry_run: say how many runs there are, and what so many seeds can tell; do none.

    Raises:
        InputError: a setting out of its range, a run that failed, or the libraries of
            ``rotopo[report]`` are not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a comparison takes {error.name}: pip install 'rotopo[report]'."
        ) from error
    comparison = Comparison(
        base, arms, rates, seeds, settings or {}, tuning_seed, outcome, choose, measure, at_once
    )
    runs = Runs(comparison, output)
    tuning = [
        Run(arm, rate, tuning_seed, tuning=True)
        for arm in arms
        for rate in comparison.rates_of(arm)
    ]
    runs.check(tuning)
    if dry_run:
        print(_plan(comparison, runs, tuning))
        return
    runs.do(tuning, "Choosing rates")
    tries = _tries(runs, tuning, choose)
    best = {one.arm: one.rate for one in tries if one.chosen}
    final = [Run(arm, best[arm], seed, tuning=False) for seed in seeds for arm in arms]
    runs.do(final, "Comparing")

    measured: dict[str, dict[int, Points]] = {arm: {} for arm in arms}
    for run in final:
        measured[run.arm][run.seed] = runs.points(run)
    fixed = {r.arm: runs.points(r) for r in tuning if r.rate == best[r.arm]}
    known = runs.points(final[0]).outcomes
    outcomes = [outcome, *(name for name in known if name != outcome)]
    results = compared(tries, fixed, measured, outcomes)
    write_whole(output / "comparison.csv", pd.DataFrame(as_table(results)).to_csv(index=False))
    write_whole(output / "comparison.html", page(comparison, results))
    for row in results.rows:
        if row.outcome == outcome:
            print(f"{row.arm} at an equal {row.place}: {row.verdict}")
    print(f"In {output}: comparison.html, comparison.csv")


def _tries(runs: Runs, tuning: list[Run], choose: Choice) -> list[Try]:
    """The tuning runs, with each arm's best one marked."""
    made: list[Try] = []
    for arm in dict.fromkeys(run.arm for run in tuning):
        tries = [tried(arm, r.rate, runs.points(r), choose) for r in tuning if r.arm == arm]
        best = chosen_rate(tries, choose.kl_cap)
        made += [replace(one, chosen=one.rate == best) for one in tries]
    return made


def _plan(comparison: Comparison, runs: Runs, tuning: list[Run]) -> str:
    n_tuning, n_final = len(tuning), len(comparison.arms) * len(comparison.seeds)
    done = sum(runs.place(run).is_done for run in tuning)
    smallest = smallest_difference(len(comparison.seeds))
    return "\n".join(
        [
            f"{n_tuning} runs choose rates ({done} of them done), {n_final} are compared: "
            f"{n_tuning + n_final} in all, {comparison.at_once} at once.",
            f"Compared by {comparison.outcome}: {OUTCOMES[comparison.outcome]}.",
            f"{len(comparison.seeds)} seeds tell a difference of {smallest:.2f} standard "
            "deviations of what varies from seed to seed, in 8 of 10 comparisons, before Holm.",
        ]
    )
