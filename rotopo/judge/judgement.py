"""What ``rotopo judge`` writes, and how it is read again."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import pandas as pd

from rotopo.errors import InputError
from rotopo.judge.scores import Scores
from rotopo.metrics.reading import Kind, json_with, member, need

_JUDGE_SETTINGS: dict[str, Kind] = {
    "level": (int, float),
    "tie": (int, float),
    "resamples": int,
    "seed": int,
}
_SCORE_COLUMNS = ("row", "policy", "judge", "score", "tokens")


class Verdict(TypedDict):
    """A policy beside the baseline under one judge; intervals are [low, high]. The win rate at
    equal length is None where no prompt shows it."""

    mean_score: float
    score_interval: list[float]
    mean_difference: float
    difference_interval: list[float]
    win_rate: float
    interval: list[float]
    wins: int
    ties: int
    losses: int
    length_controlled_win_rate: float | None
    length_controlled_interval: list[float] | None


class PolicyResult(TypedDict):
    """A policy's verdicts by judge, and measures of its responses."""

    judges: dict[str, Verdict]
    texts: dict[str, float | None]


class Result(TypedDict):
    """``judge.json``."""

    baseline: str
    prompts: int
    judges: list[str]
    policies: dict[str, PolicyResult]
    agreement: dict[str, dict[str, float | None]]
    level: float
    tie: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Judgement:
    """What ``rotopo judge`` wrote.

    Attributes:
        result: its ``judge.json``.
        scores: its ``judge_scores.csv``: row, policy, judge, score, tokens.
    """

    result: Result
    scores: pd.DataFrame

    @property
    def judges(self) -> list[str]:
        return self.result["judges"]

    @property
    def policies(self) -> list[str]:
        """The baseline first."""
        others = [name for name in self.result["policies"] if name != self.baseline]
        return [self.baseline, *others]

    @property
    def baseline(self) -> str:
        return self.result["baseline"]

    @property
    def level(self) -> str:
        """The intervals' level in per cent."""
        return f"{100 * self.result['level']:g}%"

    def table(self, judge: str) -> pd.DataFrame:
        """A judge's scores by prompt: an index of rows, a column for each policy."""
        own = self.scores[self.scores.judge == judge]
        return own.pivot(index="row", columns="policy", values="score")[self.policies]


def read_judgement(folder: Path) -> Judgement:
    """Read the folder that ``rotopo judge`` wrote to.

    Raises:
        InputError: no such folder or files, or something missing in them.
    """
    file = member("judge", folder, "judge.json", "rotopo judge")
    result = json_with(file, Result.__annotations__)
    for field, kind in _JUDGE_SETTINGS.items():
        if not isinstance(result[field], kind):
            raise InputError(f"{file}: the field {field!r} is of the wrong kind.")
    if not 0 < result["level"] < 1:
        raise InputError(f"{file}: level is {result['level']}: it has to lie between 0 and 1.")
    for policy, found in result["policies"].items():
        need(found, PolicyResult.__annotations__, f"{file}, policies.{policy}")
        for judge in result["judges"]:
            need(found["judges"], (judge,), f"{file}, policies.{policy}.judges")
            where = f"{file}, policies.{policy}.judges.{judge}"
            need(found["judges"][judge], Verdict.__annotations__, where)
    file = member("judge", folder, "judge_scores.csv", "rotopo judge")
    # Names stay text: "NA" or "1" can be a policy.
    scores = pd.read_csv(file, dtype={"policy": str, "judge": str}, keep_default_na=False)
    need(scores, _SCORE_COLUMNS, file)
    for column in ("row", "score", "tokens"):
        try:
            scores[column] = pd.to_numeric(scores[column])
        except ValueError as error:
            raise InputError(f"{file}, column {column}: {error}") from error
    judgement = Judgement(cast(Result, result), scores)
    found = set(zip(scores.policy, scores.judge, strict=True))
    for policy in judgement.policies:
        for judge in judgement.judges:
            if (policy, judge) not in found:
                raise InputError(f"{file}: no score of {policy} by {judge}, which judge.json has.")
    return judgement


def scores_csv(table: dict[str, dict[str, Scores]]) -> str:
    """The text of ``judge_scores.csv``: scores by policy and judge."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_SCORE_COLUMNS)
    for policy, by_judge in table.items():
        for name, own in by_judge.items():
            for row, score, tokens in zip(own.rows, own.scores, own.tokens, strict=True):
                writer.writerow([row, policy, name, repr(float(score)), int(tokens)])
    return text.getvalue()
