"""Files that runs and commands leave, read with errors that name what is missing."""

import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from rotopo.errors import InputError
from rotopo.files import read_jsonl

Kind = type | tuple[type, ...]


def member(place: str, folder: Path, name: str, command: str) -> Path:
    """A file of a folder.

    Args:
        place: the setting that named the folder.
        folder: where it should lie.
        name: its name.
        command: which writes it.

    Raises:
        InputError: there is no such file.
    """
    file = folder / name
    if file.is_file():
        return file
    if not folder.is_dir():
        raise InputError(f"{place}: there is no folder {folder}.")
    inside = sorted(path.parent.name for path in folder.glob(f"*/{name}"))
    hint = f"; there is one in {', '.join(inside)} below it" if inside else ""
    raise InputError(f"{place}: {folder} holds no {name}, which {command} writes{hint}.")


def json_with(file: Path, fields: Iterable[str]) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        InputError: it is none, or lacks one of the fields.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    need(value, fields, file)
    return value


def need(value: Container[str], fields: Iterable[str], place: Path | str) -> None:
    """Refuse a value, read at a place, that lacks one of the fields."""
    missing = [field for field in fields if field not in value]
    if missing:
        raise InputError(f"{place}: {missing[0]!r} is missing, which a report takes from it.")


def lines_with(file: Path, fields: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """The lines of a jsonl file in the order of their rows.

    Args:
        file: lines of objects, each with a ``row``.
        fields: those that every line has to hold, and of what kind.

    Raises:
        InputError: no such file or no line in it, or a line that is torn or lacks a field.
    """
    lines = []
    for number, line in read_jsonl(file):
        for field, kind in fields.items():
            if not isinstance(line.get(field), kind):
                raise InputError(
                    f"{file}, line {number}: the field {field!r} is missing or of the wrong kind."
                )
        lines.append(line)
    if not lines:
        raise InputError(f"{file}: no line in it.")
    return sorted(lines, key=lambda line: line["row"])
