"""Every row tokenised once: in parallel, with a progress bar, kept on disk by fingerprint."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from rotopo.data import schemas
from rotopo.data.schemas import Format, naming_row, read_row
from rotopo.data.tokens import OnBadRow, Outcome, PairEncoder, TokenizedPair
from rotopo.errors import InputError
from rotopo.files import sha256

_HASHES = "hashes.json"


@dataclass(frozen=True)
class TokenizedRows:
    """A source's rows as tokens.

    Attributes:
        pairs: columns ``prompt``, ``chosen``, ``rejected`` (lists of token ids) and ``row``, the
            index in the source, and one for each further role; rows that were dropped are
            missing. A response that an unpaired row does not have is empty.
        counts: rows by :class:`Outcome`, under its lower-case names.
        fingerprint: hash of the rows and of everything that decides their tokens.
    """

    pairs: Dataset
    counts: dict[str, int]
    fingerprint: str

    def summary(self) -> str:
        """The counts as one line."""
        counts = self.counts
        return (
            f"{sum(counts.values())} rows, {len(self.pairs)} pairs of them kept: "
            f"{counts['prompt_cut']} prompts and {counts['response_cut']} responses cut to "
            f"max_length, {counts['too_long']} rows dropped as too long, {counts['bad']} as bad"
        )


def tokenize_rows(
    rows: Dataset,
    row_format: Format,
    encoder: PairEncoder,
    cache_dir: Path,
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "error",
    extra_responses: dict[str, str] | None = None,
) -> TokenizedRows:
    """Tokenise every row once: the result is kept on disk under a fingerprint.

    The fingerprint covers the rows' content, the code that reads them, the tokenizer's content,
    the template and every setting. A result appears in the cache only when it is whole, and its
    bytes are looked at whenever it is found there.

    Args:
        rows: rows as stored.
        row_format: how to read them.
        encoder: how to tokenise them.
        cache_dir: the cache's root.
        num_proc: worker processes; None takes one per 10,000 rows, up to the processors.
        on_bad_row: whether a row that cannot be used is an error, or dropped and counted.
        extra_responses: column of each further response, by the name of its role.

    Raises:
        InputError: a row that cannot be used, with ``on_bad_row="error"``; no row is left; what is
            in the cache is damaged.
    """
    extra = extra_responses or {}
    digest = hashlib.sha256()
    parts = [fingerprint_rows(rows), row_format.name, encoder.fingerprint(), on_bad_row, extra]
    for part in [*parts, "with hashes"]:  # the last is the cache's own form
        digest.update(str(part).encode())
    for code in (schemas.__file__, row_format.source_file):
        digest.update(Path(code).read_bytes())
    fingerprint = digest.hexdigest()[:32]
    folder = cache_dir / "tokens" / fingerprint
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            mapped = _tokenize(rows, row_format, encoder, num_proc, on_bad_row, extra, unfinished)
            _save(mapped, unfinished / "result")
            (unfinished / "result").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if json.loads((folder / _HASHES).read_text("utf-8")) != _hashes(folder):
            raise ValueError("it holds other bytes than were written")
        pairs = Dataset.load_from_disk(folder / "pairs")
        counts = json.loads((folder / "counts.json").read_text("utf-8"))
        return TokenizedRows(pairs, counts, fingerprint)
    except (ValueError, OSError) as error:
        raise InputError(
            f"{folder} is damaged: remove it, and the rows are tokenised again. ({error})"
        ) from error


def fingerprint_rows(rows: Dataset) -> str:
    """Hash of the rows' content, the same wherever they were loaded from."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _tokenize(
    rows: Dataset,
    row_format: Format,
    encoder: PairEncoder,
    num_proc: int | None,
    on_bad_row: OnBadRow,
    extra: dict[str, str],
    folder: Path,
) -> Dataset:
    """All rows as tokens, with the outcome of each, in a file in the folder."""
    if num_proc is None:
        num_proc = min(os.cpu_count() or 1, len(rows) // 10_000)
    ids = List(Value("int32"))
    return rows.map(
        partial(
            _tokenize_batch,
            row_format=row_format,
            encoder=encoder,
            drop_bad=on_bad_row == "drop",
            extra=extra,
        ),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(
            prompt=ids,
            chosen=ids,
            rejected=ids,
            **dict.fromkeys(extra, ids),
            row=Value("int64"),
            outcome=Value("int8"),
        ),
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(folder / "mapped.arrow"),
        load_from_cache_file=False,
        # Else datasets hashes the tokenizer, whose pickle is not stable.
        new_fingerprint=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        desc="Tokenising",
    )


def _save(mapped: Dataset, folder: Path) -> None:
    """Keep the rows that were not dropped, and the counts."""
    outcomes = mapped.with_format("numpy")["outcome"][:]
    counts = {outcome.name.lower(): int((outcomes == outcome).sum()) for outcome in Outcome}
    kept = np.flatnonzero(outcomes < Outcome.TOO_LONG)
    if len(kept) == 0:
        raise InputError(
            f"no pair is left: {counts['too_long']} rows are longer than data.max_length, "
            f"{counts['bad']} are bad."
        )
    mapped.select(kept).remove_columns("outcome").save_to_disk(folder / "pairs")
    (folder / "counts.json").write_text(json.dumps(counts), "utf-8")
    (folder / _HASHES).write_text(json.dumps(_hashes(folder)), "utf-8")


def _hashes(folder: Path) -> dict[str, str]:
    files = [folder / "counts.json", *(folder / "pairs").iterdir()]
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def _tokenize_batch(
    batch: dict[str, list[Any]],
    numbers: list[int],
    row_format: Format,
    encoder: PairEncoder,
    drop_bad: bool,
    extra: dict[str, str],
) -> dict[str, list[Any]]:
    names = ["prompt", "chosen", "rejected", *extra, "outcome"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        pair = TokenizedPair([], [], [])
        try:
            with naming_row(number):
                preference = read_row(row_format, row, extra)
                pair, outcome = encoder.truncate(encoder.encode(preference))
        except InputError:
            if not drop_bad:
                raise
            outcome = Outcome.BAD
        columns["prompt"].append(pair.prompt)
        columns["chosen"].append(pair.chosen)
        columns["rejected"].append(pair.rejected)
        for role in extra:
            columns[role].append(pair.extra.get(role, []))
        columns["outcome"].append(int(outcome))
    return columns | {"row": numbers}
