"""What every run stood on."""

from itertools import chain
from typing import Any

import yaml

from rotopo.errors import InputError
from rotopo.metrics.runs import Run
from rotopo.report.inputs import Inputs
from rotopo.report.page import Cell, Part, Section, Settings, Table, text

ORDER = 90


def section(inputs: Inputs) -> Section:
    kinds = (
        ("test of reward model", inputs.reward_tests),
        ("training of reward model", inputs.reward_fits),
        ("training of policy", inputs.fits),
        ("test of policy", inputs.tests),
    )
    runs: list[tuple[str, Run]] = [
        (f"{run.name} ({kind})", run) for kind, own in kinds for run in own
    ]
    if not runs:
        return Section("Runs", [])
    facts = list(dict.fromkeys(chain(*(run.facts for _, run in runs))))
    rows = []
    for title, run in runs:
        cells = [text(title), *(text(value) for value in _main_settings(run))]
        cells += [_fact(run.facts.get(fact)) for fact in facts]
        rows.append(cells)
    headers = ["run", "class", "model", "adapter", "seed", *facts]
    parts: list[Part] = [
        Table(
            "Every run's class, base model and adapter (config.yaml), and what it stood on: "
            "versions, fingerprints of base model and data, numbers of pairs (hparams.yaml).",
            headers,
            rows,
        )
    ]
    for title, run in runs:
        if run.settings:
            parts.append(Settings(f"{title}: all settings (config.yaml)", run.settings))
    lead = ""
    bare = [title for title, run in runs if not run.settings]
    if bare:
        lead = f"Without a config.yaml in the folder: {', '.join(bare)}."
    return Section("Runs and settings", parts, lead)


def _main_settings(run: Run) -> list[str]:
    """Class, base model, adapter and seed, as far as config.yaml has them."""
    try:
        settings = yaml.safe_load(run.settings) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{run.folder / 'config.yaml'}: not YAML: {error}") from error
    model = settings.get("model") or {}
    arguments = model.get("init_args") or {}
    base = arguments.get("policy") or arguments.get("backbone") or {}
    adapter = base.get("adapter") or {}
    values = (
        model.get("class_path", "").rpartition(".")[2],
        base.get("path"),
        adapter.get("class_path", "").rpartition(".")[2],
        settings.get("seed_everything"),
    )
    return ["–" if value in (None, "") else str(value) for value in values]


def _fact(value: Any) -> Cell:
    if value is None:
        return Cell("–", None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(str(value))
    return Cell(f"{value:,}", value)
