"""What a part has done so far, case by case, in a file that outlives its process."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of a traceback: what a case that failed shows in results.json.
_LAST_LINES = 12

Case = Callable[[], dict[str, Any]]


class NotHereError(Exception):
    """This machine cannot run the case; the message says why."""


class WrongResultError(Exception):
    """The case ran and what it found is wrong.

    Args:
        why: in one line.
        values: what it found.
    """

    def __init__(self, why: str, values: dict[str, Any]) -> None:
        super().__init__(why)
        self.values = values


@dataclass
class Ended:
    """A case that has ended.

    Attributes:
        name: the case.
        outcome: ``passed``, ``failed`` or ``skipped``.
        seconds: how long it took.
        values: what it found.
        why: why it failed or was skipped.
    """

    name: str
    outcome: str
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)
    why: str = ""


class Journal:
    """A part's file: one JSON object a line.

    The names of all its cases first; then each case's name as it begins and all of it as it ends,
    and the line that all of them come to.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.cases: list[str] = []
        self.begun: list[str] = []
        self.ended: list[Ended] = []
        self.line = ""
        for text in file.read_text("utf-8").splitlines() if file.exists() else []:
            try:
                entry = json.loads(text)
            except ValueError:  # the line that a killed process was writing
                continue
            self.cases = entry.get("cases", self.cases)
            self.line = entry.get("line", self.line)
            if "begins" in entry:
                self.begun.append(entry["begins"])
            if "ended" in entry:
                self.ended.append(Ended(**entry["ended"]))

    @property
    def broken_off(self) -> list[str]:
        """Cases that began and never ended."""
        ended = {case.name for case in self.ended}
        return [name for name in self.begun if name not in ended]

    @property
    def not_run(self) -> list[str]:
        return [name for name in self.cases if name not in self.begun]

    def write(self, **entry: Any) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def run(
        self, cases: dict[str, Case], line: Callable[[list[Ended]], str], broken: Callable[[], bool]
    ) -> bool:
        """Run the cases that have not begun yet.

        Args:
            cases: what each does; it returns what it found, or raises.
            line: what the cases that have ended come to.
            broken: whether a case that failed has left a process in which no other can run.

        Returns:
            whether the rest is for another process.
        """
        self.write(cases=list(cases))
        for name, case in cases.items():
            if name in self.begun:
                continue
            self.write(begins=name)
            print(f"--- {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            outcome, why, values = "passed", "", {}
            try:
                values = case()
            except NotHereError as reason:
                outcome, why = "skipped", str(reason)
            # A refusal of rotopo's command line is a SystemExit, in whose context stands why.
            except (Exception, SystemExit) as error:
                outcome, values = "failed", getattr(error, "values", {})
                why = str(error) if isinstance(error, WrongResultError) else _told(error)
                traceback.print_exc()
            self.ended.append(Ended(name, outcome, time.monotonic() - began, values, why))
            self.write(ended=vars(self.ended[-1]))
            self.write(line=line(self.ended))
            if outcome == "failed" and broken():
                return True
        return False


def _told(error: BaseException) -> str:
    """The end of the traceback of what went wrong first."""
    cause = error.__context__ if isinstance(error, SystemExit) and error.__context__ else error
    lines = "".join(traceback.format_exception(cause, chain=False)).splitlines()
    return "\n".join(lines[-_LAST_LINES:])
