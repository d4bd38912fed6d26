"""A run's points, as they were written -> its distances and outcomes by group."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rotopo.compare.frontiers import Measured
from rotopo.compare.settings import OUTCOMES
from rotopo.metrics.texts import distinct, self_bleu, words


class Points:
    """What was measured of a run, in the order of its training.

    Attributes:
        steps: of the points [N].
        groups: names of the held-out groups [G], sorted.

    Args:
        folder: the run's, with ``points/STEP.json``.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted((folder / "points").glob("*.json"), key=lambda file: int(file.stem))
        self._points = [json.loads(file.read_text("utf-8")) for file in files]
        self.steps = [point["step"] for point in self._points]
        lines = [line for point in self._points for line in (*point["pairs"], *point["responses"])]
        self.groups = sorted({line["group"] for line in lines})
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def outcomes(self) -> list[str]:
        """The outcomes that were measured, of :data:`rotopo.compare.settings.OUTCOMES`."""
        point = self._points[0]
        left_out = {"score"} if "score" not in point["responses"][0] else set()
        left_out |= _WHOLE - point["whole"].keys()
        return [name for name in OUTCOMES if name not in left_out]

    def measured(self, outcome: str, distance: str = "kl") -> Measured:
        """Distance and outcome by group.

        Args:
            outcome: one of :data:`rotopo.compare.settings.OUTCOMES`.
            distance: ``kl`` for √KL(π_θ ‖ π_ref) of whole responses, or ``margin``.
        """
        sums, counts = self._of("reverse_kl" if distance == "kl" else distance)
        return Measured(sums, counts, *self._of(outcome), root=distance == "kl")

    def means(self, outcome: str) -> np.ndarray:
        """Means over all pairs or responses [N], of an outcome, or of either KL."""
        sums, counts = self._of(outcome)
        return sums.sum(1) / counts.sum()

    def _of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Sums by point and group [N, G], and how many values each group has [G]."""
        if name not in self._known:  # every arm is held against the first again
            self._known[name] = self._summed(name)
        return self._known[name]

    def _summed(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name in _WHOLE | _OF_TEXTS.keys():
            # The same whatever groups are drawn.
            values = np.array([[_single(point, name)] for point in self._points])
            return np.repeat(values, len(self.groups), 1), np.ones(len(self.groups))
        place = {group: i for i, group in enumerate(self.groups)}
        rows = [list(_values(point, name)) for point in self._points]
        sums = np.zeros((len(rows), len(place)))
        counts = np.zeros(len(place))
        for i, row in enumerate(rows):
            for group, value in row:
                sums[i, place[group]] += value
        for group, _ in rows[0]:
            counts[place[group]] += 1
        return sums, counts


def _values(point: dict[str, Any], name: str) -> Iterable[tuple[str, float]]:
    """Each pair's or response's value, with its group."""
    if name in ("reverse_kl", "score", "length"):
        key = "tokens" if name == "length" else name
        return ((line["group"], line[key]) for line in point["responses"])
    if name == "forward_kl":
        return ((line["group"], line[name]) for line in point["reference_responses"])
    return ((line["group"], _OF_PAIRS[name](line)) for line in point["pairs"])


def _single(point: dict[str, Any], name: str) -> float:
    if name in _WHOLE:
        return point["whole"][name]
    found = _OF_TEXTS[name]([words(line["text"]) for line in point["responses"]])
    return np.nan if found is None else found


# Single numbers of a point: measured as such, or of all its texts together.
_WHOLE = {"effective_rank", "neuron_cosine", "perplexity"}
_OF_TEXTS: dict[str, Callable[[list[list[str]]], float | None]] = {
    "distinct_2": partial(distinct, n=2),
    "self_bleu": self_bleu,
}


def _margin(line: dict[str, Any]) -> float:
    return line["chosen_log_ratio"] - line["rejected_log_ratio"]


_OF_PAIRS = {
    # Before the first step h is 0 of every pair: nobody knows better than chance.
    "accuracy": lambda line: (1 + np.sign(_margin(line))) / 2,
    "margin": _margin,
    "displacement": lambda line: line["chosen_log_ratio"] / line["chosen_tokens"],
}
