"""What several sections of the report share."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from rotopo.data.messages import Message, text_of
from rotopo.metrics.runs import Test, Training
from rotopo.report import score_plots, text_plots
from rotopo.report.page import Cell, Panel, Part, Picture, Table, label, number, text, with_minus

# The order of the measures of test.json in a table, and their titles.
_MEASURES = {
    "accuracy": "accuracy",
    "reward_mean": "mean score",
    "reward_std": "std of scores",
    "chosen_mean": "mean, chosen",
    "rejected_mean": "mean, rejected",
    "auroc": "AUROC",
    "ece": "ECE",
    "length_correlation": "correlation with length",
    "length_matched_accuracy": "accuracy at equal length",  # the last, with its number of pairs
}


MEASURED = (
    "Mean and standard deviation are over all responses. ECE: expected calibration error of "
    "σ(chosen − rejected). Equal length: pairs whose lengths differ by at most a tenth."
)


def measures(tests: list[Test], caption: str, others: Mapping[str, tuple[float, ...]]) -> Table:
    """The measures of test.json, a row for each model; ``others`` have the first few of them, and
    stand apart."""
    rows = [[label(test.name), *_measured(test.metrics)] for test in tests]
    for name, known in others.items():
        unknown = [Cell("–", None)] * (len(_MEASURES) - len(known))
        rows.append([text(name), Cell("–", None), *(number(f) for f in known), *unknown])
    emphasis = [False] * len(tests) + [True] * len(others)
    return Table(caption, ["model", "pairs", *_MEASURES.values()], rows, emphasis)


def by_set(tests: list[Test], what: str) -> list[Part]:
    """The measures of every evaluation set by itself, where a test was on several.

    Args:
        tests: of reward models, or of policies.
        what: they are, in words.

    Returns:
        nothing where no test was on several.
    """
    tests = [test for test in tests if test.metrics.get("sets")]
    if not tests:
        return []
    names = list(dict.fromkeys(chain(*(test.metrics["sets"] for test in tests))))
    parts: list[Part] = [
        Picture(
            "Accuracy by evaluation set",
            [
                Panel(
                    score_plots.groups(tests, names, "sets"),
                    f"Accuracy on {len(names)} evaluation sets: {', '.join(names)}.",
                    (*names, *(test.name for test in tests)),
                )
            ],
            f"Accuracy of {what} on each evaluation set, with 95% bootstrap intervals; the dashed "
            "line is chance.",
        )
    ]
    units = by_unit(tests)
    for unit, own in units.items():
        rows = [
            [label(test.name), label(name), *_measured(found)]
            for test in own
            for name, found in test.metrics["sets"].items()
        ]
        of_unit = f", scores {unit_text(unit)}" if len(units) > 1 else ""
        caption = f"Each evaluation set by itself, {what}{of_unit}. {MEASURED}"
        parts.append(Table(caption, ["model", "set", "pairs", *_MEASURES.values()], rows))
    return parts


def _measured(found: dict[str, Any]) -> list[Cell]:
    ties = found.get("ties")
    pairs = number(found["pairs"], 0, below=f"{ties:,} ties" if ties else "")
    cells = [number(found.get(name)) for name in _MEASURES]
    cells[0] = number(found["accuracy"], below=interval_text(found["accuracy_interval"]))
    matched = found.get("length_matched_pairs")
    if matched is not None:
        cells[-1] = number(found["length_matched_accuracy"], below=f"{matched:,} pairs")
    return [pairs, *cells]


Run = TypeVar("Run", Training, Test)


def by_unit(runs: list[Run]) -> dict[str | None, list[Run]]:
    """Runs whose rewards have the same unit, which alone share a scale, by the unit."""
    found: dict[str | None, list[Run]] = {}
    for run in runs:
        found.setdefault(run.reward_unit, []).append(run)
    return found


def unit_text(unit: str | None) -> str:
    """What rewards are measured in, as part of a sentence."""
    known = {
        None: "in a unit that the run does not name",
        "": "without a unit",
    }
    return known.get(unit, f"in {unit}")


def word_clouds(
    title: str, texts: dict[str, list[str]], colours: dict[str, str], seed: int
) -> list[Picture]:
    """A cloud for each set of texts; no picture where none has words."""
    panels, remarks = [], []
    for name, own in texts.items():
        figure, foreign = text_plots.word_cloud(name, own, colours[name], seed)
        if figure is None:
            remarks.append(f"{name}: no words to draw.")
        else:
            panels.append(Panel(figure, f"Word cloud of {name}, {len(own)} responses.", (name,)))
        if foreign:
            remarks.append(f"Left out of {name}, in scripts without a font here: {foreign}.")
    if not panels:
        return []
    counts = ", ".join(f"{name} {len(own):,}" for name, own in texts.items())
    caption = (
        "The most frequent words, larger the more frequent, English stop words left out. "
        f"Responses: {counts}."
    )
    return [Picture(title, panels, " ".join([caption, *remarks]))]


def interval_text(interval: list[float]) -> str:
    """An interval's ends in words."""
    return " to ".join(with_minus(end, 3) for end in interval)


def prompt_text(messages: list[Message]) -> str:
    """A single turn as it is; several with their roles."""
    if len(messages) == 1:
        return text_of(messages[0])
    return "\n\n".join(f"{message['role']}: {text_of(message)}" for message in messages)


def spread(n: int, samples: int) -> list[int]:
    """Up to so many indices below n, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, samples)).round().astype(int)).tolist()


def first_and_last(run: Training, column: str) -> str:
    """Where a metric began and ended, in words."""
    values = run.logged(column)
    return f"from {values.iloc[0]:.3g} to {values.iloc[-1]:.3g}"


def pairs_of(runs: list[Training]) -> str:
    """What each run was trained and validated on."""
    parts = []
    for run in runs:
        splits = {"pairs/train": "training", "pairs/validation": "validation"}
        known = [f"{run.facts[key]:,} {name}" for key, name in splits.items() if key in run.facts]
        parts.append(f"{run.name}: {' and '.join(known) or 'an unknown number of'} pairs")
    return "; ".join(parts)
