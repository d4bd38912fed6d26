"""Each golden run again, beside what it gave when it was recorded.

``runs.json`` holds of each run all metrics that it logged and numbers that pin its weights, in
float64. They are compared to 1e-8, which leaves room for another processor's rounding and for
nothing else. To the last bit, on one machine, and with all files: ``tests.golden.compare``.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.record import summary
from tests.golden.runs import INPUTS, RUNS, carry_out, save_inputs

EXPECTED = json.loads(Path(__file__).with_name("runs.json").read_text("utf-8"))
RELATIVE, ABSOLUTE = 1e-8, 1e-10

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    save_inputs(folder / INPUTS)
    return folder


def without_ties(line: dict[str, float]) -> dict[str, float]:
    """A line of metrics, without accuracies where policy and reference are the same still: whether
    a margin of zero is above zero is for rounding to say."""
    return {
        name: value
        for name, value in line.items()
        if not name.endswith("rewards/accuracy")
        or abs(line[name.replace("accuracy", "margin")]) > ABSOLUTE
    }


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


def test_all_runs_are_recorded():
    assert list(EXPECTED) == list(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_what_it_gave(name, folder):
    carry_out(name, folder)
    expected, found = EXPECTED[name], summary(folder / name)
    assert found["metrics"].keys() == expected["metrics"].keys()
    for command, lines in expected["metrics"].items():
        assert len(found["metrics"][command]) == len(lines)
        for number, line in enumerate(lines):
            same = without_ties(found["metrics"][command][number]) == near(without_ties(line))
            assert same, (command, number, found["metrics"][command][number], line)
    assert found["weights"].keys() == expected["weights"].keys()
    for weight, numbers in expected["weights"].items():
        for kind, value in numbers.items():
            assert found["weights"][weight][kind] == near(value), (weight, kind)
