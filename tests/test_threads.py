"""Threads: how many are free, who decides otherwise, and how they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rotopo import threads

OPENMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of four cores of ours and one of others' on which seconds pass by hand."""
    count = torch.get_num_threads()
    seconds = {"clock": 0.0, "own": 0.0, "cores": [0.0] * 5}
    tick = os.sysconf("SC_CLK_TCK")

    def passes(clock: float, own: float, *cores: float) -> None:
        """Time in which we work for so long, and each of the cores, with us on it."""
        seconds["clock"] += clock
        seconds["own"] += own
        seconds["cores"] = [a + b for a, b in zip(seconds["cores"], cores, strict=True)]
        lines = ["cpu 1 2 3 4 5 6 7 8 9 10"]
        for number, busy in enumerate(seconds["cores"]):
            # Idle and iowait, the fourth and fifth, are no work, and guests are in it already.
            kinds = [busy * tick / 4] * 3 + [9e6, 9e6, busy * tick / 4, 0, 0, 9e6, 9e6]
            lines.append(f"cpu{number} " + " ".join(str(round(k)) for k in kinds))
        (tmp_path / "stat").write_text("\n".join([*lines, "intr 1 2 3", "ctxt 5"]))

    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr(threads, "GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "times", lambda: (seconds["own"], 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(threads.time, "monotonic", lambda: seconds["clock"])
    torch.set_num_threads(4)
    passes(1, 0, 9, 9, 9, 9, 9)
    yield passes
    threads.begin({"LOCAL_RANK": "0"})  # forgets
    torch.set_num_threads(count)


@pytest.mark.parametrize(
    ("own", "cores", "expected"),
    [
        (10, (2, 3, 2, 3, 10), 4),  # nobody else, but for the core that is not ours
        (10, (10, 10, 0, 0, 0), 3),
        (5, (10, 10, 10, 10, 0), 1),  # 3.5 of the cores are others': one is left all the same
        (0, (10, 10, 10, 10, 10), 1),
        (0, (4, 0, 0, 0, 0), 4),
    ],
)
def test_cores_are_taken_that_nobody_else_keeps_busy(machine, own, cores, expected, capsys):
    threads.begin({})
    machine(10, own, *cores)
    threads.settle()
    assert torch.get_num_threads() == expected
    busy = {3: "the other is", 1: "the others are"}.get(expected)
    line = f"Computing on {expected} of 4 cores: {busy} busy (OMP_NUM_THREADS decides otherwise).\n"
    assert capsys.readouterr().err == (line if busy else "")


def test_a_run_that_goes_on_has_its_threads_again(machine, capsys):
    threads.begin({})
    machine(10, 0, 10, 10, 10, 10, 0)
    threads.settle(before=2)
    assert torch.get_num_threads() == 2
    assert "on 2 of 4 cores: as the run did that goes on (" in capsys.readouterr().err


@pytest.mark.parametrize("name", threads.NUMBERS)
def test_who_has_chosen_decides(machine, name):
    environment = {name: "3"}
    threads.begin(environment)
    machine(10, 0, 10, 10, 10, 10, 0)
    threads.settle()
    assert torch.get_num_threads() == 4
    assert environment == {name: "3", "OMP_WAIT_POLICY": "PASSIVE"}


def test_only_a_program_that_began_so_is_changed(machine):
    machine(10, 0, 10, 10, 10, 10, 0)
    threads.settle()
    assert torch.get_num_threads() == 4
    threads.begin({})
    machine(10, 0, 10, 10, 10, 10, 0)
    threads.settle(processes=2)  # their launcher shares the cores out
    assert torch.get_num_threads() == 4


def test_where_the_system_does_not_tell_nothing_is_changed(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "STAT", tmp_path / "none")
    threads.begin({})
    threads.settle()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_a_container_has_no_more_cores_than_its_quota(machine, tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    threads.begin({})
    machine(10, 0, 0, 0, 0, 0, 0)
    threads.settle()
    assert torch.get_num_threads() == expected


def test_others_work_takes_nothing_of_a_quota_while_cores_are_idle(machine, tmp_path):
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    threads.begin({})
    machine(10, 0, 10, 10, 0, 0, 0)
    threads.settle()
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not OPENMP.exists(), reason="this torch brings no OpenMP of GNU's")
@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_the_command_lets_openmp_wait_passively_before_torch_starts_it(given):
    """By what OpenMP itself says as it is loaded."""
    script = (
        "import ctypes, sys; from rotopo import cli, threads; assert 'torch' not in sys.modules;"
    )
    script += f"threads.begin(); ctypes.CDLL({str(OPENMP)!r})"
    environment = {k: v for k, v in os.environ.items() if k not in threads.WAITS}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": given} if given else {})
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert f"OMP_WAIT_POLICY = '{given or 'PASSIVE'}'" in told.stderr
