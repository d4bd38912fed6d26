"""What is shown of how far something is, in a terminal of any width and in a log."""

import io
import sys

import pytest

from rotopo.callbacks.progress import rounded, training_line, validation_line
from rotopo.progress import Progress, begin, between, duration, fitted, screen

METRICS = {
    "train/loss": 0.6931,
    "train/rewards/margin": -0.0123,
    "train/rewards/accuracy": 0.475,
    "val/loss": 0.7,
    "speed/mfu": 0.4,
    "own": 12.0,
}


def line(columns: int | None) -> str:
    return fitted(training_line(1234, 5000, 2, 3, METRICS, 34.2, 600.0, 1.5), columns)


def test_a_line_has_what_there_is_room_for():
    assert line(None) == (
        "step 1234/5000  epoch 2/3  loss 0.693  margin -0.012  acc 0.475  own 12.000  34 pairs/s  "
        "1:34:09 left"
    )
    assert line(119) == line(None)
    assert line(79) == (
        "step 1234/5000  loss 0.693  margin -0.012  acc 0.475  34 pairs/s  1:34:09 left"
    )
    assert line(40) == "step 1234/5000  loss 0.693  1:34:09 left"
    assert line(39) == "step 1234/5000  loss 0.693"


@pytest.mark.parametrize("columns", range(1, 130))
def test_no_line_is_longer_than_its_terminal(columns):
    assert len(line(columns)) <= columns
    assert line(columns).startswith("step 1234/5000"[:columns])


def test_where_the_end_is_not_known():
    parts = training_line(7, 0, 1, -1, {}, 0.0, 65.0, 9.0)
    assert fitted(parts, None) == "step 7  epoch 1  in 1:05"


def test_a_validation_has_its_own_metrics():
    assert (
        fitted(validation_line(9, METRICS, 4.0), None) == "validation, step 9  loss 0.700  in 0:04"
    )


def test_numbers_are_rounded():
    values = (0, 0.4754, -1e-5, 12345.0, float("nan"))
    assert [rounded(v, 1) for v in values] == ["0.000", "0.475", "-1e-05", "1e+04", "nan"]
    assert [rounded(v) for v in values] == ["0.000", "0.475", "-1.00e-05", "1.23e+04", "nan"]
    assert [duration(s) for s in (0.2, 65, 3723)] == ["0:00", "1:05", "1:02:03"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(monkeypatch, seconds: float, items: int, terminal: bool) -> str:
    stream, clock = io.StringIO(), Clock()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    for _ in Progress(range(items), "Scoring", clock=clock):
        clock.now += seconds
    return stream.getvalue()


def test_a_log_has_plain_lines_of_what_takes_long(monkeypatch):
    assert shown(monkeypatch, 0.1, 20, terminal=False) == ""
    assert shown(monkeypatch, 4.0, 5, terminal=False).splitlines() == [
        "Scoring  1/5  0:16 left",
        "Scoring  4/5  0:04 left",
        "Scoring  5/5  in 0:20",
    ]
    assert 5 <= len(shown(monkeypatch, 1.0, 1000, terminal=False).splitlines()) <= 7
    assert [between(whole, 300.0) for whole in (0, 250, 10_000)] == [10, 50, 300]


def test_a_terminal_has_one_line_that_goes(monkeypatch):
    text = shown(monkeypatch, 1.0, 3, terminal=True)
    assert text.replace("\r\x1b[K", "|") == (
        "Scoring  0/3|Scoring  1/3  0:02 left|Scoring  2/3  0:01 left|Scoring  3/3  in 0:03|"
    )


def test_what_others_print_takes_the_line_off(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("sys.stdout", stream)
    with Progress((), "Scoring", 3):
        print("a warning")
        assert not screen.drawn
    assert sys.stdout is sys.stderr is stream
    assert stream.getvalue() == "Scoring  0/3\r\x1b[Ka warning\n"


def test_bars_of_others_are_left_out_of_a_log_unless_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    environment: dict[str, str] = {}
    begin(environment)
    assert environment == {"TQDM_DISABLE": "1"}
    begin(asked := {"TQDM_DISABLE": "0"})
    assert asked == {"TQDM_DISABLE": "0"}
