"""Every row tokenised once: in parallel, with a progress bar, kept on disk by fingerprint."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, LargeList, List, Value, arrow_dataset

from rotopo import ranks
from rotopo.data import dialogue, formats, messages, schemas
from rotopo.data import values as values_of_texts
from rotopo.data.schemas import Format, Preference, naming_row, read_row
from rotopo.data.tokenized import Outcome, TokenizedPair
from rotopo.data.tokens import OnBadRow, OnUnwritten, PairEncoder
from rotopo.errors import InputError
from rotopo.files import sha256, writing_whole_folder
from rotopo.progress import Progress

_HASHES = "hashes.json"
# Which decide what a row says.
_CODE = (dialogue, formats, messages, schemas, values_of_texts)


@dataclass(frozen=True)
class LeftOut:
    """A part of rows that the chat template does not write.

    Attributes:
        rows: how many rows have it.
        first: the first of them, as a message names it.
        refused: whether these rows say something else without it.
    """

    rows: int
    first: str
    refused: bool


@dataclass(frozen=True)
class TokenizedRows:
    """A source's rows as tokens.

    Attributes:
        pairs: columns ``prompt``, ``chosen``, ``rejected`` (lists of token ids) and ``row``, the
            index in the source, and one for each further role; rows that were dropped are
            missing. A response that an unpaired row does not have is empty.
        counts: rows by :class:`Outcome`, under its lower-case names.
        left_out: what of the kept rows is not written, by what it is.
        fingerprint: hash of the rows and of everything that decides their tokens.
    """

    pairs: Dataset
    counts: dict[str, int]
    left_out: dict[str, LeftOut]
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
    on_unwritten: OnUnwritten = "error",
    split_dialogues: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    numbers: np.ndarray | None = None,
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
        on_unwritten: whether a row of which the template leaves something out that matters is one
            that cannot be used, where those are dropped; here it is counted in any case.
        split_dialogues, template_kwargs: as of :func:`rotopo.data.schemas.read_row`.
        numbers: of the rows to tokenise; None for all.

    Raises:
        InputError: a row that cannot be used, with ``on_bad_row="error"``; no row is left; what is
            in the cache is damaged.
    """
    extra = extra_responses or {}
    drop = {
        "bad": on_bad_row == "drop",
        "unwritten": (on_bad_row, on_unwritten) == ("drop", "error"),
    }
    digest = hashlib.sha256()
    parts = [fingerprint_rows(rows), row_format.name, encoder.fingerprint(), drop, extra]
    own = [f"template: {template_kwargs}"] if template_kwargs else []
    own += [] if numbers is None else [f"rows: {numbers.tolist()}"]
    # "with what is left out": the cache's form
    for fact in [*parts, split_dialogues, "with what is left out", *own]:
        digest.update(str(fact).encode())
    for code in (*(str(module.__file__) for module in _CODE), row_format.source_file):
        digest.update(Path(code).read_bytes())
    fingerprint = digest.hexdigest()[:32]
    folder = cache_dir / "tokens" / fingerprint
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        read = partial(
            read_row,
            row_format,
            extra_responses=extra,
            split_dialogues=split_dialogues,
            template_kwargs=template_kwargs,
        )
        # Another process may be faster.
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as scratch,
            suppress(FileExistsError),
            writing_whole_folder(folder) as part,
        ):
            mapped = _tokenize(rows, read, encoder, num_proc, drop, extra, numbers, Path(scratch))
            _save(mapped, part)
    try:
        if json.loads((folder / _HASHES).read_text("utf-8")) != _hashes(folder):
            raise ValueError("it holds other bytes than were written")
        pairs = Dataset.load_from_disk(folder / "pairs")
        found = json.loads((folder / "counts.json").read_text("utf-8"))
        left_out = {label: LeftOut(**facts) for label, facts in found["left_out"].items()}
        return TokenizedRows(pairs, found["outcomes"], left_out, fingerprint)
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


def without_filling(row: dict[str, Any], features: Features) -> dict[str, Any]:
    """A row without the nulls by which a column of structs makes all of its values alike.

    Arguments of different calls have different names, and such a column gives each of them all
    names. A column of JSON keeps values as they were written, and so do we.

    Args:
        row: its columns.
        features: their types.
    """
    return {name: _without_nulls(value, features[name]) for name, value in row.items()}


def kept_time(cache_dir: Path, key: str, now: datetime) -> datetime:
    """The time that a chat template was first given for some data.

    Args:
        cache_dir: the cache's root, where it is kept.
        key: what tells data and template apart.
        now: what it is, if this is the first time.
    """
    folder = cache_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.time"
    if not file.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".unfinished-") as unfinished:
            unfinished.write(now.isoformat())
            unfinished.flush()
            with suppress(FileExistsError):  # of another process, which was faster
                os.link(unfinished.name, file)
    try:
        return datetime.fromisoformat(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            f"{file} is damaged: remove it, or set data.template_time. ({error})"
        ) from error


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(value, dict) and isinstance(feature, dict):
        return {n: _without_nulls(v, feature[n]) for n, v in value.items() if v is not None}
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [_without_nulls(v, feature.feature) for v in value]
    return value


def _tokenize(
    rows: Dataset,
    read: Callable[[dict[str, Any]], Preference],
    encoder: PairEncoder,
    num_proc: int | None,
    drop: dict[str, bool],
    extra: dict[str, str],
    numbers: np.ndarray | None,
    folder: Path,
) -> Dataset:
    """All rows as tokens, with the outcome of each, in a file in the folder."""
    rows = rows if numbers is None else rows.select(numbers)
    if num_proc is None:
        num_proc = min(os.cpu_count() or 1, len(rows) // 10_000)
    ids = List(Value("int32"))
    with _in_our_way():
        return rows.map(
            partial(
                _tokenize_batch,
                features=rows.features,
                read=read,
                encoder=encoder,
                drop=drop,
                extra=extra,
                known=numbers,
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
                left_out=Value("string"),
            ),
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(folder / "mapped.arrow"),
            load_from_cache_file=False,
            # Else datasets hashes the tokenizer, whose pickle is not stable.
            new_fingerprint=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            desc="Tokenising",
        )


class _Bar(Progress):
    """Takes what datasets gives its own bar."""

    def __init__(self, total: int, initial: int = 0, **_: Any) -> None:
        super().__init__((), "Tokenising", total - initial, hidden=ranks.number() > 0)


@contextmanager
def _in_our_way() -> Iterator[None]:
    """Show how far datasets is as all else is shown: its own bar is one endless line in a log."""
    theirs = arrow_dataset.hf_tqdm  # told nowhere else; a test says when it moves
    arrow_dataset.hf_tqdm = _Bar
    try:
        yield
    finally:
        arrow_dataset.hf_tqdm = theirs


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
    pairs = mapped.select(kept)
    pairs.remove_columns(["outcome", "left_out"]).save_to_disk(folder / "pairs")
    found = {"outcomes": counts, "left_out": _left_out(pairs)}
    (folder / "counts.json").write_text(json.dumps(found), "utf-8")
    (folder / _HASHES).write_text(json.dumps(_hashes(folder)), "utf-8")


def _left_out(pairs: Dataset) -> dict[str, dict[str, Any]]:
    """What of rows is not written, by what it is, as :class:`LeftOut` has it."""
    found: dict[str, dict[str, Any]] = {}
    for text in pairs["left_out"][:]:
        for label, refused, first in json.loads(text or "[]"):
            known = found.setdefault(label, {"rows": 0, "first": first, "refused": refused})
            known["rows"] += 1
    return found


def _hashes(folder: Path) -> dict[str, str]:
    files = [folder / "counts.json", *(folder / "pairs").iterdir()]
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def _tokenize_batch(
    batch: dict[str, list[Any]],
    places: list[int],
    features: Features,
    read: Callable[[dict[str, Any]], Preference],
    encoder: PairEncoder,
    drop: dict[str, bool],
    extra: dict[str, str],
    known: np.ndarray | None,
) -> dict[str, list[Any]]:
    numbers = places if known is None else known[places].tolist()
    names = ["prompt", "chosen", "rejected", *extra, "outcome", "left_out"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
        row = without_filling(dict(zip(batch, values, strict=True)), features)
        pair, left_out = TokenizedPair([], [], []), ""
        try:
            with naming_row(number):
                preference = read(row)
                written = encoder.write(preference)
                unwritten = encoder.unwritten(preference, written)
                pair = encoder.tokenize(written)
                if pair.chosen == pair.rejected and unwritten:
                    raise InputError(
                        f"{unwritten[0]}, and without it chosen and rejected are the same: give a "
                        "template that does (data.chat_template)."
                    )
                pair, outcome = encoder.truncate(pair)
        except InputError:
            if not drop["bad"]:
                raise
            outcome = Outcome.BAD
        else:
            if drop["unwritten"] and any(part.refused for part in unwritten):
                pair, outcome = TokenizedPair([], [], []), Outcome.BAD
            elif unwritten:
                parts = {u.label: (u.refused, f"row {number} (from 0): {u}") for u in unwritten}
                left_out = json.dumps([(label, *facts) for label, facts in parts.items()])
        columns["prompt"].append(pair.prompt)
        columns["chosen"].append(pair.chosen)
        columns["rejected"].append(pair.rejected)
        for role in extra:
            columns[role].append(pair.extra.get(role, []))
        columns["outcome"].append(int(outcome))
        columns["left_out"].append(left_out)
    return columns | {"row": numbers}
