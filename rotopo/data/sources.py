"""Where rows come from: the Hub, local files, files in Python packages, Python functions."""

import csv
import glob
import importlib
import importlib.util
import inspect
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Json,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from rotopo.errors import InputError
from rotopo.files import OPENERS, parse_json, read_lines
from rotopo.pretrained import resource_path

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def import_function(path: str) -> Callable[..., Any]:
    """The function at a dotted path.

    Raises:
        InputError: no such module, or no such function in it.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise InputError(f"{path!r} is not a dotted path package.module.function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise InputError(f"{path}: there is no module {error.name!r} to import.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: the module {module_name!r} has no function {name!r}.")
    return function


def load_rows(source: str, split: str = "train") -> Dataset:
    """Rows of preference data, as they are stored.

    Files are read through ``datasets`` and its cache, so a second call is quick; a changed file
    is read again. Json, jsonl and csv are read into memory. Every cell of a csv file stays text:
    ``NA`` or ``4`` can be a response.

    Args:
        source: one of

            - a data set on the Hub, ``name`` or ``name:config``;
            - a local json, jsonl, csv, parquet or arrow file, where json, jsonl and csv may be
              compressed (gz, bz2, xz), or a glob of such files;
            - a folder: one that ``save_to_disk`` wrote, or data files that ``datasets`` assigns
              to splits by their names;
            - ``package:PACKAGE/relative/path``: any of the local ones inside an installed package;
            - ``python:package.module.function``: a function that returns a list of dicts or a
              ``datasets.Dataset``; a text behind another colon is its only argument, as in
              ``python:rotopo.data.qa_feedback.pairs:FILE``.
        split: the split's name, or a slice of it as in ``train[:1000]``. A file, a glob and a
            function have one split, ``train``.

    Raises:
        InputError: nothing is there; a file is torn, not UTF-8 or ragged (names file and, for
            json, jsonl and csv, the line); there is no such split; there are no rows.
    """
    if source.startswith("python:"):
        rows = _call(source, split)
    else:
        local = str(resource_path(source)) if source.startswith("package:") else source
        local = os.path.expanduser(local)
        files = sorted(glob.glob(local, recursive=True)) if glob.has_magic(local) else [local]
        if files == [local] and os.path.isdir(local):
            rows = _load_folder(local, split)
        elif files and all(map(os.path.isfile, files)):
            rows = _load_files(files, split)
        elif _builder(local) or local.startswith((".", "/")) or glob.has_magic(local):
            raise InputError(f"data.source: there is no file {source!r}.")
        else:
            rows = _load_from_hub(source, split)
    if len(rows) == 0:
        raise InputError(f"{source}: there are no rows in the split {split!r}.")
    return rows


def _call(source: str, split: str) -> Dataset:
    if split != "train":
        raise _one_split(source, split)
    path, *argument = source.removeprefix("python:").split(":", maxsplit=1)
    function = import_function(path)
    try:
        inspect.signature(function).bind(*argument)
    except TypeError as error:
        raise InputError(
            f"data.source: {source}: {error}; an argument stands behind a colon, as in "
            "python:rotopo.data.qa_feedback.pairs:FILE."
        ) from error
    rows = function(*argument)
    if isinstance(rows, Dataset):
        return rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{source} returned a {type(rows).__name__}: return a list of dicts or a "
            "datasets.Dataset."
        )
    try:
        return _from_rows(rows)
    except Exception as error:  # ours, pyarrow's and json's, for values that neither can keep
        raise InputError(f"{source}: {_cause(error)}") from error


def _load_folder(folder: str, split: str) -> Dataset:
    if (Path(folder) / "state.json").exists() or (Path(folder) / "dataset_dict.json").exists():
        try:
            saved = load_from_disk(folder)
        except Exception as error:  # whatever pyarrow and the readers of its companions raise
            raise InputError(f"{folder}: {_cause(error)}") from error
        saved = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        if split not in saved:
            raise InputError(f"{folder}: no split {split!r}, only {', '.join(saved)}.")
        return saved[split]
    files = [str(file) for file in Path(folder).rglob("*") if _builder(str(file)) == "json"]
    for file in files:
        for _ in _json_rows(file):  # what is wrong with one is said of its line
            pass
    try:
        rows = cast(Dataset, load_dataset(folder, split=split))
    except Exception as error:  # whatever the readers of four file formats raise
        raise InputError(f"{folder}: {_cause(error)}") from error
    if files and "timestamp" in str(rows.features.arrow_schema):
        raise InputError(
            f"{folder}: texts that look like dates are read as dates in a folder: give its files "
            f"by a glob, {folder}/*, and hold out fractions."
        )
    return rows


def _load_files(files: Sequence[str], split: str) -> Dataset:
    builders = {_builder(file) for file in files}
    builder = builders.pop()
    if builder is None or builders:
        raise InputError(
            f"data.source: {', '.join(files[:3])}: give files of one kind, out of "
            f"{', '.join(_BUILDERS)}; json, jsonl and csv may end in {', '.join(OPENERS)}."
        )
    try:
        if builder == "json":
            return _part(_from_rows([row for file in files for row in _json_rows(file)]), split)
        if builder == "csv":
            return _part(_from_rows(_csv_rows(files)), split)
        return cast(Dataset, load_dataset(builder, data_files={"train": list(files)}, split=split))
    except Exception as error:  # whatever the readers of four file formats raise
        if isinstance(error, InputError) and str(error).startswith(tuple(files)):
            raise
        if str(error).startswith("Unknown split"):
            raise _one_split(", ".join(files[:3]), split) from error
        if str(error).endswith("corresponds to no data!"):
            raise InputError(f"{', '.join(files[:3])}: there are no rows.") from error
        advice = ""
        # What reads the source itself wraps its errors; json and csv are in no cache.
        if isinstance(error, pa.ArrowInvalid | OSError) and builder not in ("json", "csv"):
            cache = Path(datasets.config.HF_DATASETS_CACHE) / builder
            advice = f" (the copy in {cache} may be damaged: remove it, and it is made again)"
        raise InputError(f"{', '.join(files[:3])}: {_cause(error)}{advice}") from error


def _json_rows(file: str) -> Iterator[dict[str, Any]]:
    """Objects of a json or jsonl file: one a line, a list of them, or a single one.

    Not by the reader of ``datasets``: it takes texts that look like dates for dates, and long
    integers for others nearby; half of a surrogate pair it leaves out; and a line that holds null
    ends the process.
    """
    lines = read_lines(file)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise InputError(f"{file}: the file is empty.")
    lines = read_lines(file)
    in_one = first.lstrip().startswith("[")
    # A single object may take several lines; else it is the first line that is wrong.
    if in_one or (not _is_json(first) and _is_json("".join(read_lines(file)))):
        whole = _json_value(file, 1, "".join(lines))
        entries = whole if isinstance(whole, list) else [whole]
        values: Iterable[tuple[int, Any]] = ((1, value) for value in entries)
    else:
        values = (
            (number, _json_value(file, number, line))
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )
    for place, (number, value) in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(
                f"{file}, line {number}, entry {place} (from 0): a JSON object is needed, not "
                f"{json.dumps(value)[:40]}."
            )
        yield value


def _is_json(text: str) -> bool:
    try:
        parse_json(text.rstrip())
    except ValueError:
        return False
    return True


def _json_value(file: str, number: int, text: str) -> Any:
    """The value of a JSON text that begins in a line of a file."""
    try:
        return parse_json(text.rstrip())
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise InputError(f"{file}, line {line}: not JSON: {error.msg}.") from error
    except ValueError as error:
        raise InputError(f"{file}, line {number}: not JSON that can be read: {error}.") from error


def _from_rows(rows: list[dict[str, Any]]) -> Dataset:
    """Rows whose columns may be missing, or of mixed types, here and there."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [_column(name, [row.get(name) for row in rows]) for name in names]
    return concatenate_datasets(columns, axis=1) if columns else Dataset.from_dict({})


def _column(name: str, values: list[Any]) -> Dataset:
    try:
        column = Dataset.from_dict({name: values})
        if _keeps_values(column, values):
            return column
    except Exception:  # pyarrow's, for values of mixed types
        pass
    # Written by us: datasets would leave texts that happen to be JSON, such as null, as they are,
    # and read something else.
    texts = _json_texts(values)
    try:
        column = Dataset.from_dict({name: texts}, Features({name: Json()}))
        same = _json_texts(column[name][:]) == texts
    except Exception as error:  # whatever its reader raises
        raise InputError(f"column {name!r}: {_cause(error)}") from error
    if not same:
        raise InputError(f"column {name!r}: its values are of several types, or too large to keep.")
    return column


def _keeps_values(column: Dataset, values: list[Any]) -> bool:
    """Whether a typed column says just what was written: pyarrow takes true for 1.0; inside of
    objects 1 for 1.0, which a call's arguments are not the same with; and gives all objects the
    same names in the same order, null where one has none, as it has where one says null."""
    schema = str(column.features.arrow_schema)
    if "double" not in schema and "struct" not in schema:
        return True
    kinds: dict[tuple[str | None, ...], set[type]] = defaultdict(set)
    names: dict[tuple[str | None, ...], set[tuple[str, ...]]] = defaultdict(set)
    _collect(values, (), kinds, names)
    return all(len(orders) == 1 for orders in names.values()) and not any(
        {bool, float} <= kind or (len(path) > 1 and ({int, float} <= kind or type(None) in kind))
        for path, kind in kinds.items()
    )


def _collect(
    value: Any,
    path: tuple[str | None, ...],
    kinds: dict[tuple[str | None, ...], set[type]],
    names: dict[tuple[str | None, ...], set[tuple[str, ...]]],
) -> None:
    """Types of all that stands inside a value, and names of objects, by the names on the way."""
    if isinstance(value, dict):
        names[path].add(tuple(value))
        for name, inner in value.items():
            _collect(inner, (*path, name), kinds, names)
    elif isinstance(value, list):
        for inner in value:
            _collect(inner, (*path, None), kinds, names)
    else:
        kinds[path].add(type(value))


def _json_texts(values: list[Any]) -> list[str | None]:
    return [None if value is None else json.dumps(value) for value in values]


def _part(rows: Dataset, split: str) -> Dataset:
    """A slice of rows, as ``train[:10%]`` says it."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except Exception as error:  # of several types, for what is no such text
        if str(error).startswith("Unknown split"):
            raise
        raise InputError(f"the split {split!r}: {_cause(error)}") from error
    numbers = [n for part in parts for n in range(len(rows))[part.from_ : part.to]]
    return rows if len(numbers) == len(rows) else rows.select(numbers)


def _load_from_hub(source: str, split: str) -> Dataset:
    name, _, config = source.partition(":")
    try:
        return cast(Dataset, load_dataset(name, config or None, split=split))
    except Exception as error:  # whatever the Hub, the network and the readers raise
        raise InputError(
            f"data.source: {source!r} is no local file or folder, and loading it from the "
            f"Hugging Face Hub failed: {_cause(error)}"
        ) from error


def _builder(file: str) -> str | None:
    path = Path(file)
    if path.suffix in OPENERS:
        path = path.with_suffix("")
        return _BUILDERS[path.suffix] if path.suffix in (".json", ".jsonl", ".csv") else None
    return _BUILDERS.get(path.suffix)


def _csv_rows(files: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of csv files with the same columns, their cells as texts.

    Not by the reader of ``datasets``, which is pandas': it fills short lines up with missing
    values, takes the first column for an index where every line is too long, and ends texts at
    a NUL.
    """
    csv.field_size_limit(2**31 - 1)
    rows: list[dict[str, Any]] = []
    columns: list[str] | None = None
    for file in files:
        reader = csv.reader(read_lines(file), strict=True)
        try:
            header = next(reader, [])
            if not header or not all(header) or len(set(header)) < len(header):
                raise InputError(f"{file}: the first line has to name the columns, each once.")
            if header != (columns or header):
                raise InputError(f"{file}: its columns differ from those of {files[0]}.")
            columns = header
            for record in reader:
                if not record:
                    continue
                if len(record) != len(header):
                    raise InputError(
                        f"{file}, line {reader.line_num}: {len(record)} cells, but the header "
                        f"names {len(header)} columns."
                    )
                rows.append(dict(zip(header, record, strict=True)))
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: {error}.") from error
    return rows


def _one_split(source: str, split: str) -> InputError:
    return InputError(
        f"{source} has no split {split!r}, only 'train': to hold out a part of it, give "
        "data.validation or data.test a fraction."
    )


def _cause(error: BaseException) -> str:
    """First line of what went wrong, without the wrapper that says only that something did."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0]
