"""What runs have logged and measured, read from their folders ``version_N``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rotopo.errors import InputError
from rotopo.metrics.reading import Kind, json_with, lines_with, member

_PAIR_FIELDS: dict[str, Kind] = {
    "row": int,
    "chosen_score": (int, float),
    "rejected_score": (int, float),
    "chosen_tokens": int,
    "rejected_tokens": int,
    "prompt": list,
    "chosen": str,
    "rejected": str,
}
_TEST_FIELDS = ("pairs", "accuracy", "accuracy_interval", "reward_mean", "reward_std", "groups")


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

    @property
    def reward_unit(self) -> str | None:
        """The unit of its rewards, empty where they have none; None where the run does not say."""
        unit = self.facts.get("reward_unit")
        return unit if isinstance(unit, str) else None


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


def read_training(setting: str, name: str, folder: Path) -> Training:
    """Read a run of ``rotopo fit``.

    Raises:
        InputError: no such folder, or nothing of a training in it.
    """
    place = f"{setting}.{name}"
    file = member(place, folder, "metrics.csv", "rotopo fit")
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
    metrics = json_with(member(place, folder, "test.json", "rotopo test"), _TEST_FIELDS)
    file = member(place, folder, "test_pairs.jsonl", "rotopo test")
    pairs = pd.DataFrame(lines_with(file, _PAIR_FIELDS))
    return Test(name, folder, *_settings_and_facts(folder), metrics, pairs)


def _settings_and_facts(folder: Path) -> tuple[str, dict[str, Any]]:
    settings, facts = folder / "config.yaml", folder / "hparams.yaml"
    try:
        return (
            settings.read_text(encoding="utf-8") if settings.exists() else "",
            (yaml.safe_load(facts.read_text(encoding="utf-8")) or {}) if facts.exists() else {},
        )
    except yaml.YAMLError as error:
        raise InputError(f"{facts}: not YAML: {error}") from error
