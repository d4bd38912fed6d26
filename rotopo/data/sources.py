"""Where rows come from: the Hub, local files, files in Python packages, Python functions."""

import csv
import glob
import importlib
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from rotopo.errors import InputError
from rotopo.files import OPENERS, read_lines
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
    is read again. Every cell of a csv file stays text: ``NA`` or ``4`` can be a response.

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
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow's, for values of mixed types
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
    _check_utf8(files)
    try:
        return cast(Dataset, load_dataset(folder, split=split))
    except Exception as error:  # whatever the readers of four file formats raise
        for file in files:
            _check_json(file)
        raise InputError(f"{folder}: {_cause(error)}") from error


def _load_files(files: Sequence[str], split: str) -> Dataset:
    builders = {_builder(file) for file in files}
    builder = builders.pop()
    if builder is None or builders:
        raise InputError(
            f"data.source: {', '.join(files[:3])}: give files of one kind, out of "
            f"{', '.join(_BUILDERS)}; json, jsonl and csv may end in {', '.join(OPENERS)}."
        )
    settings: dict[str, Any] = {}
    if builder == "csv":
        columns = [_csv_columns(file) for file in files]
        for file, names in zip(files, columns, strict=True):
            if names != columns[0]:
                raise InputError(f"{file}: its columns differ from those of {files[0]}.")
        # Else pandas guesses types, and reads the response NA as missing.
        settings["features"] = Features({name: Value("string") for name in columns[0]})
        settings["keep_default_na"] = False
    elif builder == "json":
        _check_utf8(files)
    try:
        return cast(
            Dataset,
            load_dataset(builder, data_files={"train": list(files)}, split=split, **settings),
        )
    except Exception as error:  # whatever the readers of four file formats raise
        if str(error).startswith("Unknown split"):
            raise _one_split(", ".join(files[:3]), split) from error
        if str(error).endswith("corresponds to no data!"):
            raise InputError(f"{', '.join(files[:3])}: there are no rows.") from error
        for file in files:
            if builder == "json":
                _check_json(file)
        advice = ""
        if isinstance(error, pa.ArrowInvalid | OSError):  # what reads the source wraps its errors
            cache = Path(datasets.config.HF_DATASETS_CACHE) / builder
            advice = f" (the copy in {cache} may be damaged: remove it, and it is made again)"
        raise InputError(f"{', '.join(files[:3])}: {_cause(error)}{advice}") from error


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


def _csv_columns(file: str) -> list[str]:
    """Column names of a csv file whose every line has been checked: pandas fills short lines up
    with missing values, and takes the first column for an index where every line is too long."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read_lines(file), strict=True)
    try:
        header = next(reader, [])
        if not header or len(set(header)) < len(header):
            raise InputError(f"{file}: the first line has to name the columns, each once.")
        for record in reader:
            if record and len(record) != len(header):
                raise InputError(
                    f"{file}, line {reader.line_num}: {len(record)} cells, but the header names "
                    f"{len(header)} columns."
                )
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}.") from error
    return header


def _check_utf8(files: Iterable[str]) -> None:
    """Raise the error for the first json file that is not UTF-8: some of them datasets would read
    as other text."""
    for file in files:
        for _ in read_lines(file):
            pass


def _check_json(file: str) -> None:
    """Raise the error that names the line of a json or jsonl file which cannot be parsed."""
    lines = list(read_lines(file))
    text = "".join(lines)
    if not text.strip():
        raise InputError(f"{file}: the file is empty.")
    is_list = text.lstrip().startswith("[")
    for number, part in [(1, text)] if is_list else enumerate(lines, start=1):
        try:
            if part.strip():
                json.loads(part.rstrip())
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise InputError(f"{file}, line {line}: not JSON: {error.msg}.") from error


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
