"""What several sections of the report share."""

from collections.abc import Mapping

import numpy as np

from rotopo.data.messages import Message, text_of
from rotopo.metrics.runs import Test, Training
from rotopo.report import text_plots
from rotopo.report.page import Cell, Panel, Picture, Table, number, text, with_minus

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


def measures(tests: list[Test], caption: str, others: Mapping[str, tuple[float, ...]]) -> Table:
    """The measures of test.json, a row for each model; ``others`` have the first few of them, and
    stand apart."""
    rows = []
    for test in tests:
        ties = test.metrics.get("ties")
        pairs = number(test.metrics["pairs"], 0, below=f"{ties:,} ties" if ties else "")
        cells = [text(test.name), pairs]
        for name in _MEASURES:
            cells.append(number(test.metrics.get(name)))
        interval = interval_text(test.metrics["accuracy_interval"])
        cells[2] = number(test.metrics["accuracy"], below=interval)
        matched = test.metrics.get("length_matched_pairs")
        if matched is not None:
            share = test.metrics["length_matched_accuracy"]
            cells[-1] = number(share, below=f"{matched:,} pairs")
        rows.append(cells)
    for name, figures in others.items():
        unknown = [Cell("–", None)] * (len(_MEASURES) - len(figures))
        rows.append([text(name), Cell("–", None), *(number(f) for f in figures), *unknown])
    headers = ["model", "pairs", *_MEASURES.values()]
    emphasis = [False] * len(tests) + [True] * len(others)
    return Table(caption, headers, rows, emphasis)


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
            panels.append(Panel(figure, f"Word cloud of {name}, {len(own)} responses."))
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
