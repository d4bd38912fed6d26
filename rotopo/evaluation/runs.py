"""What the report reads: folders of runs, a judgement, responses, embeddings."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rotopo.data.schemas import Message
from rotopo.errors import InputError
from rotopo.files import read_jsonl

_PAIR_FIELDS = {
    "row": int,
    "chosen_score": (int, float),
    "rejected_score": (int, float),
    "chosen_tokens": int,
    "rejected_tokens": int,
    "prompt": list,
    "chosen": str,
    "rejected": str,
}
_RESPONSE_FIELDS = {"row": int, "prompt": list, "response": str, "tokens": int}
_TEST_FIELDS = ("pairs", "accuracy", "accuracy_interval", "reward_mean", "reward_std", "groups")
_JUDGE_FIELDS = ("baseline", "prompts", "judges", "policies", "agreement")
_JUDGE_SETTINGS: dict[str, Any] = {
    "level": (int, float),
    "tie": (int, float),
    "resamples": int,
    "seed": int,
}
_POLICY_FIELDS = ("judges", "texts")
_VERDICT_FIELDS = (
    *("mean_score", "score_interval", "mean_difference", "difference_interval", "win_rate"),
    *("interval", "wins", "ties", "losses", "length_controlled_win_rate"),
    "length_controlled_interval",
)
_SCORE_COLUMNS = ("row", "policy", "judge", "score", "tokens")


@dataclass(frozen=True)
class Run:
    """A run's folder ``version_N``.

    Attributes:
        name: what the report calls it.
        folder: where it lies.
        settings: the text of its ``config.yaml``; empty where a run was not made by the command.
        facts: its ``hparams.yaml``: versions, fingerprints, numbers of pairs.
    """

    name: str
    folder: Path
    settings: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Training(Run):
    """A run of ``rotopo fit``.

    Attributes:
        metrics: its ``metrics.csv``, a row for each time that something was logged.
    """

    metrics: pd.DataFrame

    def logged(self, column: str) -> pd.Series:
        """A metric's values by optimiser step; empty where it was not logged."""
        if column not in self.metrics:
            return pd.Series(dtype=float)
        return self.metrics.dropna(subset=[column]).groupby("step")[column].last()


@dataclass(frozen=True)
class Test(Run):
    """A run of ``rotopo test`` on pairs.

    Attributes:
        metrics: its ``test.json``.
        pairs: its ``test_pairs.jsonl``, a row for each pair.
    """

    metrics: dict[str, Any]
    pairs: pd.DataFrame


@dataclass(frozen=True)
class Judgement:
    """What ``rotopo judge`` wrote.

    Attributes:
        result: its ``judge.json``.
        scores: its ``judge_scores.csv``: row, policy, judge, score, tokens.
    """

    result: dict[str, Any]
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


@dataclass(frozen=True)
class Response:
    """A line of a policy's responses: the prompt, the text, and its length in tokens."""

    prompt: list[Message]
    text: str
    tokens: int


def read_training(setting: str, name: str, folder: Path) -> Training:
    """Read a run of ``rotopo fit``.

    Raises:
        InputError: no such folder, or nothing of a training in it.
    """
    place = f"{setting}.{name}"
    file = _member(place, folder, "metrics.csv", "rotopo fit")
    try:
        metrics = pd.read_csv(file)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a table of metrics: {error}") from error
    if "train/loss" not in metrics or "step" not in metrics:
        raise InputError(
            f"{place}: {file} holds no train/loss: give the folder of a run of rotopo fit."
        )
    return Training(name, folder, *_settings_and_facts(folder), metrics)


def read_test(setting: str, name: str, folder: Path) -> Test:
    """Read a run of ``rotopo test``.

    Raises:
        InputError: no such folder, no test of pairs in it, or a file that is not what it says.
    """
    place = f"{setting}.{name}"
    metrics = _read_json(_member(place, folder, "test.json", "rotopo test"), _TEST_FIELDS)
    file = _member(place, folder, "test_pairs.jsonl", "rotopo test")
    pairs = pd.DataFrame(_checked_lines(file, _PAIR_FIELDS))
    return Test(name, folder, *_settings_and_facts(folder), metrics, pairs)


def read_judgement(folder: Path) -> Judgement:
    """Read the folder that ``rotopo judge`` wrote to.

    Raises:
        InputError: no such folder or files, or something missing in them.
    """
    file = _member("judge", folder, "judge.json", "rotopo judge")
    result = _read_json(file, (*_JUDGE_FIELDS, *_JUDGE_SETTINGS))
    for field, kind in _JUDGE_SETTINGS.items():
        if not isinstance(result[field], kind):
            raise InputError(f"{file}: the field {field!r} is of the wrong kind.")
    if not 0 < result["level"] < 1:
        raise InputError(f"{file}: level is {result['level']}: it has to lie between 0 and 1.")
    for policy, found in result["policies"].items():
        _need(found, _POLICY_FIELDS, f"{file}, policies.{policy}")
        for judge in result["judges"]:
            _need(found["judges"], (judge,), f"{file}, policies.{policy}.judges")
            where = f"{file}, policies.{policy}.judges.{judge}"
            _need(found["judges"][judge], _VERDICT_FIELDS, where)
    file = _member("judge", folder, "judge_scores.csv", "rotopo judge")
    # Names stay text: "NA" or "1" can be a policy.
    scores = pd.read_csv(file, dtype={"policy": str, "judge": str}, keep_default_na=False)
    _need(scores, _SCORE_COLUMNS, file)
    for column in ("row", "score", "tokens"):
        try:
            scores[column] = pd.to_numeric(scores[column])
        except ValueError as error:
            raise InputError(f"{file}, column {column}: {error}") from error
    judgement = Judgement(result, scores)
    found = set(zip(scores.policy, scores.judge, strict=True))
    for policy in judgement.policies:
        for judge in judgement.judges:
            if (policy, judge) not in found:
                raise InputError(f"{file}: no score of {policy} by {judge}, which judge.json has.")
    return judgement


def read_responses(setting: str, name: str, file: Path) -> dict[int, Response]:
    """Responses of a policy by the row of their prompt.

    Raises:
        InputError: no such file, or a line that is no response.
    """
    if not file.is_file():
        raise InputError(f"{setting}.{name}: there is no file {file}.")
    lines = _checked_lines(file, _RESPONSE_FIELDS)
    return {
        line["row"]: Response(line["prompt"], line["response"], line["tokens"]) for line in lines
    }


def read_embeddings(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings x [n, D] and their labels [n], of an .npz with these two arrays or of a .csv
    with a column ``label`` among columns of numbers.

    Raises:
        InputError: no such file, no such arrays, or values that are not finite numbers.
    """
    if not file.is_file():
        raise InputError(f"embeddings: there is no file {file}.")
    if file.suffix == ".npz":
        try:
            with np.load(file) as arrays:  # without what has to be unpickled
                _need(arrays, ("x", "labels"), file)
                x, labels = arrays["x"], arrays["labels"].astype(str)
        except InputError:
            raise
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"embeddings: {file}: {error}") from error
    elif file.suffix == ".csv":
        table = pd.read_csv(file, dtype={"label": str}, keep_default_na=False)
        _need(table, ("label",), file)
        labels = table.pop("label").to_numpy(dtype=str)
        x = table.to_numpy()
    else:
        raise InputError(f"embeddings: {file} is neither an .npz nor a .csv file.")
    try:
        x = x.astype(float)
    except ValueError as error:
        raise InputError(f"embeddings: {file}: {error}") from error
    if x.ndim != 2 or labels.shape != x.shape[:1] or len(x) < 4:
        raise InputError(
            f"embeddings: {file} holds x {list(x.shape)} and labels {list(labels.shape)}: x has to "
            "be [n, D] and labels [n], n at least 4."
        )
    if not np.isfinite(x).all():
        raise InputError(f"embeddings: {file}: not all of the values are finite.")
    return x, labels


def _member(place: str, folder: Path, name: str, command: str) -> Path:
    file = folder / name
    if file.is_file():
        return file
    if not folder.is_dir():
        raise InputError(f"{place}: there is no folder {folder}.")
    inside = sorted(path.parent.name for path in folder.glob(f"*/{name}"))
    hint = f"; there is one in {', '.join(inside)} below it" if inside else ""
    raise InputError(f"{place}: {folder} holds no {name}, which {command} writes{hint}.")


def _settings_and_facts(folder: Path) -> tuple[str, dict[str, Any]]:
    settings, facts = folder / "config.yaml", folder / "hparams.yaml"
    try:
        return (
            settings.read_text(encoding="utf-8") if settings.exists() else "",
            (yaml.safe_load(facts.read_text(encoding="utf-8")) or {}) if facts.exists() else {},
        )
    except yaml.YAMLError as error:
        raise InputError(f"{facts}: not YAML: {error}") from error


def _read_json(file: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    _need(value, fields, file)
    return value


def _need(value: Any, fields: tuple[str, ...], place: Path | str) -> None:
    missing = [field for field in fields if field not in value]
    if missing:
        raise InputError(f"{place}: {missing[0]!r} is missing, which a report takes from it.")


def _checked_lines(file: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for number, line in read_jsonl(file):
        for field, kind in fields.items():
            if not isinstance(line.get(field), kind):
                raise InputError(
                    f"{file}, line {number}: the field {field!r} is missing or of the wrong kind."
                )
        lines.append(line)
    if not lines:
        raise InputError(f"{file}: no line in it.")
    return sorted(lines, key=lambda line: line["row"])
