"""Where a study puts its tables and pictures, and what it has of them before it is done."""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

import rotopo
from rotopo.errors import InputError
from rotopo.files import write_whole, writing_whole
from rotopo.progress import Progress
from rotopo.report.figures import save


def check(output: Path) -> None:
    """See that results can be put there, before they are computed.

    Raises:
        InputError: it is a file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file: name a folder.")


class Job(NamedTuple):
    """A part of a table.

    Attributes:
        table: its name.
        of: what of it; with the table's name no other job's.
        size: how much work it is, beside the others.
        compute: the rows.
    """

    table: str
    of: str
    size: int
    compute: Callable[[], pd.DataFrame]

    @property
    def name(self) -> str:
        return f"{self.table}, {self.of}"

    def rows(self) -> list[dict[str, Any]]:
        return self.compute().to_dict("records")


class Parts:
    """What a study has computed so far, kept in ``unfinished-KEY.jsonl`` until its results are
    written. The same study goes on from it: with the same settings and the same code.

    Args:
        output: the study's folder.
        facts: the settings, as text or as JSON can hold them.
        classes: whose code counts too, and that of their bases, wherever it is.

    Raises:
        InputError: what was kept is damaged.
    """

    def __init__(self, output: Path, facts: Any, classes: Iterable[type]) -> None:
        digest = hashlib.sha256(json.dumps(facts, default=str).encode())
        for code in sorted({*Path(rotopo.__file__).parent.rglob("*.py"), *_code_of(classes)}):
            digest.update(code.read_bytes())
        self.file = output / f"unfinished-{digest.hexdigest()[:8]}.jsonl"
        self.rows = self._read() if self.file.exists() else {}
        others = [file.name for file in output.glob("unfinished-*.jsonl") if file != self.file]
        if self.rows:
            _say(f"Going on: {self.file} has {len(self.rows)} parts of this study.")
        elif others:
            _say(f"Starting over: {', '.join(others)} in {output} is of other settings or code.")

    def of(self, name: str, compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """A part's rows: computed and kept, or as they were kept.

        Args:
            name: of the part.
            compute: its rows.
        """
        if name not in self.rows:
            self.rows[name] = json.loads(json.dumps(compute(), default=lambda value: value.item()))
            lines = [{"part": name, "rows": rows} for name, rows in self.rows.items()]
            write_whole(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        return self.rows[name]

    def tables(self, jobs: Sequence["Job"], title: str) -> dict[str, pd.DataFrame]:
        """All jobs' tables, saying how far it is."""
        left = sum(job.size for job in jobs if job.name not in self.rows)
        found: dict[str, list[dict[str, Any]]] = {job.table: [] for job in jobs}
        shown: Progress[Job] = Progress((), title, left, hidden=not left)
        with shown:
            for job in jobs:
                is_new = job.name not in self.rows
                found[job.table] += self.of(job.name, job.rows)
                if is_new:
                    shown.update(job.size, job.name)
        return {table: pd.DataFrame(rows) for table, rows in found.items()}

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        try:
            lines = map(json.loads, self.file.read_text("utf-8").splitlines())
            return {line["part"]: line["rows"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.file} is damaged: remove it, and the study starts over. ({error})"
            ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _code_of(classes: Iterable[type]) -> set[Path]:
    """The files of classes and of their bases."""
    files = set()
    for one in {base for cls in classes for base in cls.__mro__}:
        try:
            files.add(Path(inspect.getfile(one)))
        except (TypeError, OSError):  # built in
            continue
    return files


def write(
    output: Path,
    tables: dict[str, pd.DataFrame],
    figures: dict[str, Figure],
    summary: str,
    parts: Parts,
) -> None:
    """Write tables (csv) and pictures (png) by name, and print a summary; the parts that they were
    made from go.

    Files appear only when all of them are complete.
    """
    with ExitStack() as complete:
        for name, table in tables.items():
            stream = complete.enter_context(writing_whole(output / f"{name}.csv"))
            table.to_csv(stream, index=False)
        for name, figure in figures.items():
            stream = complete.enter_context(writing_whole(output / f"{name}.png"))
            save(figure, stream, "png")
    parts.file.unlink(missing_ok=True)
    print(summary)
    print(
        f"In {output}: {', '.join(sorted(f'{n}.csv' for n in tables))}; "
        f"{', '.join(sorted(f'{n}.png' for n in figures))}"
    )
