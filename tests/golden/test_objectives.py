"""The objectives beside ``objectives.json``, which is there for other projects too."""

import json
from typing import Any

import pytest

import rotopo.objectives
from tests.golden.objectives import FILE, defaults, evaluated, evaluated_reward_model

VALUES = json.loads(FILE.read_text("utf-8"))


def assert_near(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_near(found[name], value, f"{where}: {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_near(one, other, f"{where}[{place}]")
    elif expected is None:
        assert found is None, where
    else:
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15), where


def test_all_objectives_have_values():
    assert {entry["class"] for entry in VALUES["objectives"]} == set(rotopo.objectives.__all__)


@pytest.mark.parametrize(
    "entry", VALUES["objectives"], ids=lambda entry: f"{entry['name']}, {entry['inputs']}"
)
def test_an_objective_gives_what_it_gave(entry):
    assert entry["defaults"].items() <= defaults(entry).items()
    for kind, found in evaluated(entry, VALUES["inputs"]).items():
        assert_near(found, entry[kind], kind)


@pytest.mark.parametrize("entry", VALUES["reward_models"], ids=lambda entry: entry["name"])
def test_a_reward_model_gives_what_it_gave(entry):
    for kind, found in evaluated_reward_model(entry, VALUES["inputs"]["rewards"]).items():
        assert_near(found, entry[kind], kind)
