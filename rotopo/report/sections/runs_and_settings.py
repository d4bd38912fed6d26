"""What every run stood on."""

from itertools import chain
from typing import Any

import yaml

from rotopo.errors import InputError
from rotopo.metrics.runs import Run
from rotopo.report.inputs import Inputs
from rotopo.report.page import Cell, Part, Section, Settings, Table, label, text

ORDER = 90

_SPLITS = {"train": "training", "validation": "validation", "test": "test"}
_WORDS = {
    "base_fingerprint": "base model (fingerprint)",
    "fingerprint": "pairs (fingerprint)",
    "reward_unit": "unit of rewards",
    "columns/unread": "columns that were not read",
    "template_time": "date that the template was given",
    "noise/flipped": "labels flipped",
    "mixture": "mixture of sources",
}
_OUTCOMES = {
    "whole": "whole",
    "prompt_cut": "with a cut prompt",
    "response_cut": "with a cut response",
    "too_long": "too long, left out",
    "bad": "unreadable, left out",
}
_ADAPTERS = {"LoraConfig": "LoRA", "RotationConfig": "rotation"}


def section(inputs: Inputs) -> Section:
    kinds = (
        ("test of reward model", inputs.reward_tests),
        ("training of reward model", inputs.reward_fits),
        ("training of policy", inputs.fits),
        ("test of policy", inputs.tests),
    )
    runs: list[tuple[str, str, Run]] = [(run.name, kind, run) for kind, own in kinds for run in own]
    if not runs:
        return Section("Runs", [])
    facts = list(dict.fromkeys(chain(*(run.facts for *_, run in runs))))
    shared = [f for f in facts if len({str(run.facts.get(f)) for *_, run in runs}) == 1]
    own = [fact for fact in facts if fact not in shared] if len(runs) > 1 else []
    rows = [
        [
            label(name),
            text(kind),
            *(label(value) for value in _main_settings(run)),
            *(_fact(run.facts.get(fact)) for fact in own),
        ]
        for name, kind, run in runs
    ]
    headers = ["run", "what", "objective", "base model", "adapter", "seed", *map(in_words, own)]
    what = ", and what else they differ in" if own else ""
    parts: list[Part] = [
        Table(
            f"The runs, their objectives, models and adapters{what}.",
            headers,
            rows,
            hints={in_words(fact): fact for fact in own},
        )
    ]
    common = shared if len(runs) > 1 else facts
    if common:
        cells = [[Cell(in_words(f), f, whole=f), _fact(runs[0][2].facts[f])] for f in common]
        caption = "The same in all of them" if len(runs) > 1 else "What it stood on"
        parts.append(
            Table(f"{caption}: versions, fingerprints, numbers of rows.", ["what", "value"], cells)
        )
    for name, kind, run in runs:
        if run.settings:
            parts.append(Settings(f"{name} ({kind}): all settings", run.settings))
    lead = ""
    bare = [f"{name} ({kind})" for name, kind, run in runs if not run.settings]
    if bare:
        lead = f"Without a config.yaml in the folder, and so without settings: {', '.join(bare)}."
    return Section("Runs and settings", parts, lead)


def in_words(fact: str) -> str:
    """What a run's fact is of, such as ``pairs/train/films`` or ``rows/train/too_long``."""
    kind, *rest = fact.split("/")
    if fact in _WORDS:
        return _WORDS[fact]
    if kind == "left_out" and rest:
        return f"rows left out of {'/'.join(rest)}"
    if kind == "pairs" and rest and rest[0] in _SPLITS:
        return ", ".join([f"{_SPLITS[rest[0]]} pairs", *(["/".join(rest[1:])] if rest[1:] else [])])
    if kind == "rows" and len(rest) > 1 and rest[-1] in _OUTCOMES and rest[-2] in _SPLITS:
        of = f" of {'/'.join(rest[:-2])}" if rest[:-2] else ""
        return f"{_SPLITS[rest[-2]]} rows{of} {_OUTCOMES[rest[-1]]}"
    return f"version of {fact}" if not rest else fact


def _main_settings(run: Run) -> list[str]:
    """Objective, base model, adapter and seed, as far as config.yaml has them."""
    try:
        settings = yaml.safe_load(run.settings) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{run.folder / 'config.yaml'}: not YAML: {error}") from error
    model = settings.get("model") or {}
    arguments = model.get("init_args") or {}
    base = arguments.get("policy") or arguments.get("backbone") or {}
    objective = model.get("class_path", "").rpartition(".")[2]
    adapter = (base.get("adapter") or {}).get("class_path", "").rpartition(".")[2]
    values = (
        {"RewardModule": "reward model"}.get(objective, objective),
        base.get("path"),
        _ADAPTERS.get(adapter, adapter.removesuffix("Config")),
        settings.get("seed_everything"),
    )
    return ["–" if value in (None, "") else str(value) for value in values]


def _fact(value: Any) -> Cell:
    if value is None:
        return Cell("–", None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(str(value) or "none")
    return Cell(f"{value:,}", value)
