"""Signals end a process in one line, by the status that a shell expects of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_WAITS = """
import os, signal, sys, time
from rotopo import endings
from rotopo.files import writing_whole
from pathlib import Path
# As in a terminal, even where the tests run in the background and ignore them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
{before}
with endings.in_one_line("before the end."):
    with writing_whole(Path("whole.txt")) as stream:
        {work}
        print("ready", flush=True)
        time.sleep(20)
"""


def started(folder: Path, before: str = "", work: str = "pass") -> subprocess.Popen:
    """A process that is writing a file and waits."""
    command = [sys.executable, "-c", _WAITS.format(before=before, work=work)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen, number: int) -> tuple[int, str]:
    """Its status and what it says."""
    process.send_signal(number)
    return process.wait(10), process.stderr.read()


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
)
def test_a_signal_ends_in_one_line_and_leaves_no_file(tmp_path, number, name):
    status, said = end(started(tmp_path), number)
    assert (status, said) == (128 + number, f"rotopo: ended by {name} before the end.\n")
    assert list(tmp_path.iterdir()) == []


def test_another_rank_says_nothing(tmp_path):
    process = started(tmp_path, before="os.environ['RANK'] = '1'")
    assert end(process, signal.SIGINT) == (130, "")


def test_what_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    process = started(tmp_path, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert end(process, signal.SIGTERM)[0] == 143


@pytest.mark.parametrize(
    "fails",
    [
        "finally: 1 / 0",
        "except BaseException: pass\n        raise ImportError",  # which knows of no signal
    ],
)
def test_a_failure_while_it_ends_is_no_traceback(tmp_path, fails):
    work = """try:
            print("ready", flush=True)
            time.sleep(20)
        FAILS"""
    process = started(tmp_path, work=work.replace("FAILS", fails))
    assert end(process, signal.SIGINT) == (130, "rotopo: ended by Ctrl-C before the end.\n")


_ASKED = "signals = endings.Signals(lambda number: os.write(1, b'asked\\n')); signals.take()"


def test_a_second_ctrl_c_ends_at_once_but_not_its_echo(tmp_path):
    """What shells and torchrun pass on within half a second is the same one."""
    process = started(tmp_path, work=_ASKED)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.stdout.readline() == "asked\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.6)
    assert end(process, signal.SIGINT) == (-signal.SIGINT, "")
    assert process.stdout.read() == ""


def test_a_worker_that_was_forked_ends_by_sigterm_alone(tmp_path):
    work = """child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM"""
    assert end(started(tmp_path, work=work), signal.SIGINT)[0] == 130
