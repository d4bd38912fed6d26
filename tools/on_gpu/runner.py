"""Runs parts one after the other, each in a process that is killed at its time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tools.on_gpu.journal import Ended, Journal

WIDTH = 100  # of the terminal
# What results.json is spared and failures.txt holds of a failed part: its last characters.
_OUTPUT = 400_000
# A part is not begun with less time left than that.
_LEAST_SECONDS = 3.0


@dataclass(frozen=True)
class Part:
    """A part as it is to be run.

    Attributes:
        name: what ``--parts`` calls it.
        command: its process, but for the journal's path, which comes behind.
        seconds: how long it may take.
        environment: variables beside our own.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What came of a part.

    Attributes:
        name: the part.
        outcome: ``passed``; ``failed``; ``at limit``, killed; or ``not run``, for want of time.
        seconds: how long it took.
        limit: how long it might have taken.
        line: what its cases come to.
        cases: those that have ended, and those that a process died of or was killed in.
        not_run: names of the others.
    """

    name: str
    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    line: str = ""
    cases: list[Ended] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def counted(self, outcome: str) -> list[str]:
        return [case.name for case in self.cases if case.outcome == outcome]

    def shown(self) -> str:
        """In one line of the terminal."""
        head = f"{self.name:<11}{self.outcome:<9}{self.seconds:4.0f} s  "
        texts = [self.line] if self.line else []
        for outcome in ("failed", "skipped"):
            names = self.counted(outcome)
            if names:
                texts.append(f"{len(names)} {outcome}" + f" ({names[0]})" * (outcome == "failed"))
        if self.not_run:
            texts.append(f"{len(self.not_run)} not run")
        text = head + "; ".join(reversed(texts))  # so that what failed is never cut off
        return (text if len(text) <= WIDTH else text[: WIDTH - 3] + "...").rstrip()


def run(
    parts: list[Part], seconds: float, folder: Path, facts: dict[str, Any], scratch: Path
) -> bool:
    """Run parts, print a line for each, and write results.json, summary.txt and failures.txt.

    Args:
        parts: in this order.
        seconds: for all of them; what has not begun by then is not run.
        folder: where the files go; they are whole after every part.
        facts: what results.json begins with.
        scratch: for journals and all that the parts write.

    Returns:
        whether all that ran passed.
    """
    began, results = time.monotonic(), []
    failures = folder / "failures.txt"
    failures.unlink(missing_ok=True)
    for part in parts:
        left = seconds - (time.monotonic() - began)
        if left < _LEAST_SECONDS:
            result = Result(part.name, "not run")
        else:
            output = scratch / f"{part.name}.txt"
            result = _run(part, min(part.seconds, left), output, scratch)
            if result.outcome != "passed":
                _append(failures, part.name, output)
        results.append(result)
        print(result.shown(), flush=True)
        took = time.monotonic() - began
        every = facts | {"seconds": round(took, 1), "parts": [_plain(r) for r in results]}
        _write(folder / "results.json", json.dumps(every, indent=1))
        _write(folder / "summary.txt", "".join(r.shown() + "\n" for r in results))
    return all(result.outcome in ("passed", "not run") for result in results)


def _run(part: Part, seconds: float, output: Path, scratch: Path) -> Result:
    """One part, in as many processes as it dies of, for so long at most."""
    journal, began = scratch / f"{part.name}.jsonl", time.monotonic()
    died: list[Ended] = []
    status: int | None = 0
    with output.open("w", encoding="utf-8") as text:
        while True:
            before = len(Journal(journal).begun)
            left = seconds - (time.monotonic() - began)
            status = _process(part, journal, left, scratch, text)
            now = Journal(journal)
            known = {case.name for case in died}
            how = "was running when the time was up" if status is None else _death(status)
            died += [
                Ended(name, "failed", 0.0, why=f"its process {how}")
                for name in now.broken_off
                if name not in known
            ]
            if status in (0, None) or len(now.begun) == before or not now.not_run:
                break
    took = time.monotonic() - began
    cases = [*now.ended, *died]
    result = Result(part.name, "passed", took, seconds, now.line, cases, now.not_run)
    if status is None:
        result.outcome = "at limit"
    elif result.counted("failed") or result.not_run or not now.cases:
        result.outcome = "failed"
    if not now.cases:  # it did not get as far as its first case
        result.line = _last_line(output)
    return result


def _process(
    part: Part, journal: Path, seconds: float, scratch: Path, output: TextIO
) -> int | None:
    """Its exit status; None if it was killed at the end of its time."""
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    name, *arguments = part.command
    process = subprocess.Popen(
        [name, *arguments, str(journal)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment | part.environment,
        # A group of its own, which ends with all that the part has started.
        start_new_session=True,
    )
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            try:
                return process.wait(timeout=max(0.0, min(0.5, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                _progress(part.name, until, journal)
        return None
    finally:
        _progress("", until, journal)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _progress(name: str, until: float, journal: Path) -> None:
    """What is running now, on one line of standard error that is written over."""
    if not sys.stderr.isatty():
        return
    text = ""
    if name:
        now = Journal(journal)
        case = now.begun[-1] if now.begun else "starting"
        text = f"{name}: {case}, {len(now.begun)} of {len(now.cases)}"
        text += f", {until - time.monotonic():.0f} s left"
    print(f"\r\033[K{text[:WIDTH]}", end="", file=sys.stderr, flush=True)


def _death(status: int) -> str:
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def _last_line(output: Path) -> str:
    lines = output.read_text("utf-8", errors="replace").splitlines()
    return next((text.strip() for text in reversed(lines) if text.strip()), "nothing was said")


def _append(failures: Path, name: str, output: Path) -> None:
    text = output.read_text("utf-8", errors="replace")[-_OUTPUT:]
    with failures.open("a", encoding="utf-8") as file:
        file.write(f"===== {name}\n{text}\n")


def _plain(result: Result) -> dict[str, Any]:
    return vars(result) | {"cases": [vars(case) for case in result.cases]}


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
