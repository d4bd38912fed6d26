"""The page of a comparison: who is ahead, by how much, how sure, and every curve."""

import importlib.metadata

from rotopo.compare import plots
from rotopo.compare.differences import Difference
from rotopo.compare.results import AXES, Results, Row
from rotopo.compare.settings import OUTCOMES, Comparison
from rotopo.report.figures import SERIES
from rotopo.report.page import (
    Cell,
    Panel,
    Part,
    Picture,
    Section,
    Table,
    number,
    render,
    with_minus,
)

_TITLES = {
    "accuracy": "Accuracy",
    "margin": "Margin",
    "displacement": "Chosen log-ratio",
    "score": "Judge's score",
    "length": "Length",
    "distinct_2": "Distinct-2",
    "self_bleu": "Self-BLEU",
    "effective_rank": "Effective rank",
    "neuron_cosine": "Neuron cosine",
    "perplexity": "Perplexity",
}


def page(comparison: Comparison, results: Results) -> str:
    """The page as HTML.

    Args:
        comparison: its settings.
        results: what came of it.
    """
    first = next(iter(comparison.arms))
    n = len(comparison.seeds)
    about = (
        f"{', '.join(comparison.arms)}: trained alike but for what differs between them, on {n} "
        f"seeds each, and compared with {first} where they are equally far from the reference.\n\n"
        "An interval is Student's t over seeds, whose runs are paired by the order of their pairs; "
        "p values are adjusted within an outcome's comparisons (Holm). It says what other seeds "
        "would change, on these held-out pairs and prompts; what others of those would change is "
        "in the table of single seeds."
    )
    sections = [
        _differences(comparison, results),
        _frontiers(results),
        _over_training(comparison, results),
        _rates(comparison, results),
        _single_seeds(comparison, results),
    ]
    return render("Comparison", about, _summary(comparison, results), sections)


def _summary(comparison: Comparison, results: Results) -> list[tuple[str, str]]:
    """In words, of the primary outcome."""
    lines = []
    for row in _of(results, comparison.outcome):
        where = f"at an equal {row.place}"
        found = row.difference
        if found is None:
            lines.append((row.arm, f"{where}: {row.verdict}."))
            continue
        line = f"{where}: {row.verdict}"
        line += (
            " from"
            if row.verdict == "not told apart"
            else {"ahead": " of", "behind": ""}.get(row.verdict, " than")
        )
        line += f" {row.against}, {_title(row.outcome).lower()} {_signed(found.mean)}"
        line += _interval(found)
        if row.verdict == "not told apart" and found.smallest is not None:
            line += f"; a difference of {found.smallest:.3g} would have been seen in 8 of 10 trials"
        lines.append((row.arm, f"{line}."))
    if not lines:
        lines.append(("Nothing is compared", "no level is reached by all tuning runs."))
    return lines


def _differences(comparison: Comparison, results: Results) -> Section:
    headers = [
        "Outcome",
        "At equal",
        "Arm",
        "Difference",
        "95 % interval",
        "p (Holm)",
        "Could tell",
    ]
    headers += ["Verdict"]
    cells = [
        [
            Cell(_title(row.outcome), _title(row.outcome)),
            Cell(row.place, f"{row.axis}{row.quarter}"),
            Cell(row.arm, row.arm),
            number(None if row.difference is None else row.difference.mean, 4),
            _interval_cell(row.difference),
            number(row.p_holm, 3),
            number(None if row.difference is None else row.difference.smallest, 3),
            Cell(row.verdict, row.verdict),
        ]
        for row in results.rows
    ]
    caption = (
        f"Each arm's outcome less {next(iter(comparison.arms))}'s, means over "
        f"{len(comparison.seeds)} seeds. Levels are the quarters of the range that all arms reach "
        "in the tuning runs; where a run has not been that far there is no number, and nothing is "
        "extrapolated. “Could tell”: the true difference that so many seeds would have found in 8 "
        "of 10 trials, before Holm."
    )
    for axis in [axis for axis, at in results.levels.items() if not at]:
        caption += (
            f" The tuning runs have no {axis} in common: nothing is compared at an equal one."
        )
    emphasis = [row.outcome == comparison.outcome for row in results.rows]
    return Section("Differences", [Table(caption, headers, cells, emphasis)])


def _frontiers(results: Results) -> Section:
    parts: list[Part] = []
    for axis, label in AXES.items():
        outcomes = [o for o in dict.fromkeys(row.outcome for row in results.rows) if o != axis]
        panels = []
        for outcome in outcomes:
            arms = {
                arm: [run.measured(outcome, axis).frontier() for run in by_seed.values()]
                for arm, by_seed in results.runs.items()
            }
            figure = plots.frontiers(
                arms, results.levels[axis], _colours(results), _title(outcome), label
            )
            alt = f"{OUTCOMES[outcome]} by {label}, a line for each run."
            panels.append(Panel(figure, alt, tuple(arms)))
        parts.append(
            Picture(
                f"At equal {'sequence KL' if axis == 'kl' else 'margin'}",
                panels,
                "A thin line is a run, a thick one its arm's mean where all have been; the grey "
                "lines are the levels. A run counts where it is farther than ever before.",
            )
        )
    return Section("Frontiers", parts)


def _over_training(comparison: Comparison, results: Results) -> Section:
    names = {
        "reverse_kl": "KL(π_θ ‖ π_ref), nats a response",
        "forward_kl": "KL(π_ref ‖ π_θ), nats a response",
        "margin": "Margin h, nats",
        comparison.outcome: _title(comparison.outcome),
    }
    points = {arm: list(by_seed.values()) for arm, by_seed in results.runs.items()}
    panels = [
        Panel(
            plots.over_steps(points, name, _colours(results), title),
            f"{title} by optimiser step, a line for each run.",
            tuple(points),
        )
        for name, title in names.items()
    ]
    caption = (
        "Means over held-out pairs, and over responses drawn from the policy (for the KL of the "
        "reference beside the policy, from the reference), of whole next-token distributions "
        "summed over a response."
    )
    return Section("Over training", [Picture("Every run", panels, caption)])


def _rates(comparison: Comparison, results: Results) -> Section:
    cells = [
        [
            Cell(one.arm, one.arm),
            Cell(f"{one.rate:g}", one.rate),
            number(one.best, 4),
            number(one.kl, 3),
            number(one.step, 0),
            Cell("chosen" if one.chosen else "", "a" if one.chosen else "b"),
        ]
        for one in results.tries
    ]
    cap = comparison.choose.kl_cap
    within = "" if cap is None else f", of those with a KL of {cap:g} nats at most"
    best = _title(comparison.choose.best).lower()
    table = Table(
        f"Seed {comparison.tuning_seed}, measured on the validation split: the rate with the best "
        f"{best} at any point after the start{within}. Every arm has as many tries.",
        ["Arm", "Learning rate", f"Best {best}", "KL there, nats", "Step", ""],
        cells,
        [one.chosen for one in results.tries],
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")
    )
    return Section("Learning rates", [table], f"Trained with {versions}.")


def _single_seeds(comparison: Comparison, results: Results) -> Section:
    cells = []
    for row in _of(results, comparison.outcome):
        for seed, pair in zip(comparison.seeds, row.pairs, strict=True):
            interval = pair.interval
            text = "–" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"
            cells.append(
                [
                    Cell(row.place, f"{row.axis}{row.quarter}"),
                    Cell(row.arm, row.arm),
                    Cell(str(seed), seed),
                    number(pair.difference, 4),
                    Cell(text, None if interval is None else interval[0]),
                    number(pair.reached, 2),
                ]
            )
    caption = (
        "One pair of runs in each row, with the bootstrap over groups of held-out prompts (the "
        "distance and the outcome drawn together): what another held-out set would change for "
        "these two runs, and nothing about other seeds. The last column is the share of resamples "
        "in which both have been that far."
    )
    headers = ["At equal", "Arm", "Seed", "Difference", "95 % interval over groups", "Reached"]
    return Section("Single seeds", [Table(caption, headers, cells)])


def _of(results: Results, outcome: str) -> list[Row]:
    return [row for row in results.rows if row.outcome == outcome]


def _title(outcome: str) -> str:
    return _TITLES[outcome]


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + with_minus(value, 3)


def _interval(found: Difference) -> str:
    if found.interval is None:
        return ""
    return f" ({_signed(found.interval[0])} to {_signed(found.interval[1])})"


def _interval_cell(found: Difference | None) -> Cell:
    if found is None or found.interval is None:
        return Cell("–", None)
    return Cell(_interval(found).strip(" ()"), found.interval[0])


def _colours(results: Results) -> dict[str, str]:
    return {arm: SERIES[i % len(SERIES)] for i, arm in enumerate(results.runs)}
