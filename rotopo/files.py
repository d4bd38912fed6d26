"""Files: text read with errors that name the line, anything written whole or not at all."""

import bz2
import errno
import glob
import gzip
import hashlib
import json
import lzma
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rotopo.errors import InputError, chain

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def read_lines(file: str) -> Iterator[str]:
    """Lines of a UTF-8 text file, decompressed by its suffix.

    Raises:
        InputError: it cannot be read, or a line is not UTF-8.
    """
    number = 0
    try:
        with OPENERS.get(Path(file).suffix, open)(file, "rb") as raw:
            for number, line in enumerate(raw, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, line {number}: not UTF-8: convert the file.") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        cause = str(error) or type(error).__name__
        raise InputError(f"{file}: cannot be read: {cause}") from error


def parse_json(text: str, finite: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: the text.
        finite: refuse NaN and infinite numbers, which JSON has no word for, but Python writes.

    Raises:
        ValueError: it is no JSON (then a ``json.JSONDecodeError``, which knows the line); or JSON
            that readers understand differently or not at all: a name twice in an object or with a
            NUL, half of a surrogate pair, nesting too deep, an integer of thousands of digits.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} is twice in an object")
        if any("\0" in name for name in found):
            raise ValueError("a name holds the character NUL, at which other software ends it")
        return found

    def number(literal: str) -> float:
        value = float(literal)
        if finite and not math.isfinite(value):
            raise ValueError(f"{literal} is no finite number")
        return value

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half of a surrogate pair") from error
    return value


def read_jsonl(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a jsonl file, each with the number of its line.

    Raises:
        InputError: no readable file, a line that holds no JSON object, or a torn last line.
    """
    for number, line in enumerate(read_lines(str(file)), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, finite=True)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError) and not line.endswith("\n"):
                raise InputError(
                    f"{file}, line {number}: torn off in the middle: whatever writes the file was "
                    "cut short; let it finish."
                ) from error
            raise InputError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(
                f"{file}, line {number}: a JSON object is needed, not {line[:40].strip()!r}."
            )
        yield number, value


@contextmanager
def writing_whole(file: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when it is complete and on the disk.

    Nothing of it stays behind when writing fails; a killed process leaves what :func:`unfinished`
    finds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    to_disk(file.parent)  # else the new name may not outlive a loss of power


@contextmanager
def writing_whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its name only when it is complete and on the disk.

    Nothing of it stays behind when filling fails; a killed process leaves a hidden folder beside
    it, which :func:`unfinished` finds.

    Raises:
        FileExistsError: there is something in the folder already, of another process perhaps,
            which was faster.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    part.mkdir()
    try:
        yield part
        for parent, _, names in os.walk(part):
            for name in names:
                to_disk(Path(parent, name))
            to_disk(Path(parent))
        try:
            part.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(error.errno, error.strerror, str(folder)) from error
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    to_disk(folder.parent)


def to_disk(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(file: Path) -> Iterator[Path]:
    """What processes have written, or write at this moment, of a file."""
    return file.parent.glob(f".{glob.escape(file.name)}.{'[0-9a-f]' * 32}")


def write_whole(file: Path, text: str) -> None:
    """Write a text file as :func:`writing_whole` does."""
    with writing_whole(file) as stream:
        stream.write(text.encode())


def sha256(file: Path) -> str:
    """Hash of a file's bytes; about half a second for a gigabyte."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def full_disk(error: BaseException | None) -> OSError | None:
    """The full disk, spent quota or limit on a file's size behind an error; None if it is none."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    found = (e for e in chain(error) if isinstance(e, OSError) and e.errno in full)
    return next(found, None)


def to_json(value: Any) -> str:
    """Indented JSON; a number that is not finite, which JSON has no word for, is an error."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_jsonl(lines: list[dict[str, Any]]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
