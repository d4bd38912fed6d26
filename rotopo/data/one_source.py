"""One source: how it is read, and its splits as they are stored, as rows and as tokens."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rotopo.data.filters import RowFilter
from rotopo.data.schemas import FORMATS, Format, Preference, read_row, resolve_format
from rotopo.data.settings import at_least
from rotopo.data.splits import Splits
from rotopo.data.tokenized import Outcome
from rotopo.data.tokens import OnBadRow, OnUnwritten, PairEncoder
from rotopo.errors import InputError

if TYPE_CHECKING:  # else rotopo --help would wait for datasets, pandas and pyarrow
    from datasets import Dataset

    from rotopo.data.token_cache import LeftOut, TokenizedRows


@dataclass(frozen=True)
class Source:
    """One of several sources of pairs, or a set to evaluate on.

    In ``data.source``, what is None is as ``data`` has it for all sources. In ``data.validation``
    and ``data.test`` the same is so for a set without a ``source``, which is another split of the
    training's; a set with a ``source`` is read by its own settings alone.

    Args:
        source: where its rows are, as ``data.source`` names it.
        name: in metrics and messages; None takes the last part of ``source``. (A set's name is
            its key.)
        split: which split of the source; None takes ``data.train_split``.
        format: as ``data.format``.
        columns: as ``data.columns``.
        filter: as ``data.filter``.
        group_by: as ``data.group_by``.
        margin: as ``data.margin``.
        chat_template_kwargs: arguments of the chat template, laid over ``data``'s and under the
            rows' own.
        rows: use only so many of its training pairs, drawn by ``data.split_seed``; of its pairs
            where none is for training: of a set, or with ``data.test`` 1. None for all.
        weight: its share of the pairs of every step, in relation to the other sources' weights.
            An epoch ends as the first source has been through all of its pairs, and the others go
            on in the next where they stopped. None, then for all sources, mixes whole sources.
        repetitions: how often an epoch has each of its pairs, where there are no weights;
            fractions are fine. None is 1.
    """

    source: str | None = None
    name: str | None = None
    split: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    filter: RowFilter | None = None
    group_by: str | None = None
    margin: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    rows: int | None = None
    weight: float | None = None
    repetitions: float | None = None

    def over(self, common: "Source") -> "Source":
        """These settings, and those of all sources where there are none."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        return replace(common, **given)


class Loaded(NamedTuple):
    """One of a source's splits: its rows as stored, as its format reads them, and as tokens."""

    stored: "Dataset"
    rows: "Dataset"
    format: Format
    tokenized: "TokenizedRows"


@dataclass(frozen=True)
class Reading:
    """How all sources of a run are read and tokenised."""

    encoder: PairEncoder
    cache_dir: Path
    num_proc: int | None
    on_bad_row: OnBadRow
    on_unwritten: OnUnwritten
    extra_responses: dict[str, str]
    split_dialogues: bool
    stop_clock: Callable[[str], None]
    say: Callable[[str], None]


@dataclass(eq=False)
class OneSource:
    """A source of a run.

    Attributes:
        settings: its own, complete.
        name: what messages call it.
        splits: which of its rows are for what.
        loaded: by split.
    """

    settings: Source
    name: str
    splits: Splits
    loaded: dict[str, Loaded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("source.rows", self.settings.rows, 1)

    @property
    def path(self) -> str:
        """Where its rows are."""
        return self.splits.source

    def load(self, reading: Reading) -> None:
        """Read and tokenise its splits, or look them up in the cache."""
        for split in self.splits.named:
            if split not in self.loaded:
                self.loaded[split] = self._load(split, reading)

    def _load(self, split: str, reading: Reading) -> Loaded:
        from rotopo.data.sources import load_rows
        from rotopo.data.token_cache import fingerprint_rows, tokenize_rows

        stored = load_rows(self.path, split)
        rows = self._renamed(stored)
        if reading.encoder.template.reads_clock:
            reading.stop_clock(fingerprint_rows(rows))
        where = f"{self.path} [{split}]"
        kept: np.ndarray | None = None
        if self.settings.filter is not None:
            kept = self.settings.filter.numbers(stored, where)
            name = type(self.settings.filter).__name__
            reading.say(f"data.filter: {name} keeps {len(kept)} of {where}'s {len(stored)} rows.")
        try:
            self._check_columns()
            row_format = resolve_format(self.settings.format, rows)
            tokenized = tokenize_rows(
                rows,
                row_format,
                reading.encoder,
                reading.cache_dir,
                reading.num_proc,
                reading.on_bad_row,
                reading.extra_responses,
                reading.on_unwritten,
                reading.split_dialogues,
                self.settings.chat_template_kwargs,
                kept,
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return Loaded(stored, rows, row_format, tokenized)

    def _renamed(self, stored: "Dataset") -> "Dataset":
        """The rows under the names that formats know, as ``columns`` has them."""
        columns = self.settings.columns or {}
        for ours, theirs in columns.items():
            if theirs not in stored.column_names:
                raise InputError(
                    f"data.columns: {self.path} has no column {theirs!r} to be {ours!r}, only "
                    f"{', '.join(stored.column_names)}."
                )
        if len(set(columns.values())) < len(columns):
            raise InputError("data.columns names one column for two things.")
        # A column in the way of another's new name is not what is meant by it.
        covered = [c for c in stored.column_names if c in columns and c not in columns.values()]
        names = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
        return stored.remove_columns(covered).rename_columns(names) if names else stored

    def _check_columns(self) -> None:
        """Refuse names that no format has, or not the one that is set."""
        name = self.settings.format
        if name is not None and name not in FORMATS:
            return  # a user's function, of which nobody knows what it reads
        formats = FORMATS.values() if name is None else [FORMATS[name]]
        known = dict.fromkeys(column for one in formats for column in one.known)
        for ours in self.settings.columns or {}:
            if ours not in known:
                raise InputError(
                    f"data.columns: {ours!r} is not a column of {name or 'any format'}, only "
                    f"{', '.join(known)}."
                )

    @cached_property
    def chosen(self) -> dict[str, tuple[str, np.ndarray]]:
        """For train, validation and test: a split, and the numbers of its rows."""
        return self.splits.choose({split: one.stored for split, one in self.loaded.items()})

    def pairs(self, name: str, first: int) -> "Dataset":
        """The tokenised pairs that are for something; of training ``rows`` of them.

        Args:
            name: ``train``, ``validation`` or ``test``, one of ``chosen``.
            first: the number that the split's first row is to have.

        Raises:
            InputError: there is none, or fewer than ``rows``.
        """
        split, numbers = self.chosen[name]
        pairs = self.loaded[split].tokenized.pairs
        kept = np.flatnonzero(np.isin(pairs.with_format("numpy")["row"][:], numbers))
        if len(kept) == 0:
            raise InputError(
                f"No {name} pair is left of {self.path}: every one of them was dropped"
                f"{'' if self.settings.filter is None else ', or not kept by data.filter'}."
            )
        wanted = self.settings.rows
        if wanted is not None and (name == "train" or "train" not in self.chosen):
            if wanted > len(kept):
                raise InputError(
                    f"data: {self.name} has {len(kept)} pairs ({name}), and its rows is {wanted}: "
                    "lower it, or leave it out (repetitions repeats pairs)."
                )
            kept = np.sort(kept[self.splits.permutation(len(kept))[:wanted]])
        return _numbered(pairs, first).select(kept)

    def preference(
        self,
        split: str,
        row: int,
        extra_responses: Mapping[str, str] | None,
        split_dialogues: bool,
    ) -> Preference:
        """A row as messages, labelled as in the source."""
        from rotopo.data.token_cache import without_filling

        one = self.loaded[split]
        values = without_filling(one.rows[row], one.rows.features)
        return read_row(
            one.format,
            values,
            extra_responses,
            split_dialogues,
            self.settings.chat_template_kwargs,
        )

    def column(self, split: str, column: str, numbers: "list[int]", setting: str) -> list[Any]:
        """The values of a column of the source.

        Args:
            split: of the source.
            column: the column, as stored.
            numbers: of the rows.
            setting: which names it.

        Raises:
            InputError: the source has no such column.
        """
        stored = self.loaded[split].stored
        if column not in stored.column_names:
            raise InputError(
                f"{setting}: {self.path} has no column {column!r}, only "
                f"{', '.join(stored.column_names)}."
            )
        return stored.select(numbers)[column][:]

    def groups(self, name: str) -> set[str]:
        """Values of ``group_by`` in what is for something; none where there is no such column."""
        if self.settings.group_by is None or name not in self.chosen:
            return set()
        split, numbers = self.chosen[name]
        return set(
            map(str, self.column(split, self.settings.group_by, numbers.tolist(), "data.group_by"))
        )

    def unread_columns(self) -> list[str]:
        """Columns, as stored, that neither its format nor its filter reads, each once."""
        theirs, chooses = self.settings.columns or {}, self.settings.filter
        if chooses is not None and chooses.columns is None:
            return []
        read_by_filter = set(chooses.columns or ()) if chooses is not None else set()
        unread: dict[str, None] = {}
        for one in self.loaded.values():
            read = set(one.rows.column_names) - set(one.format.unread(one.rows.column_names))
            known = {theirs.get(column, column) for column in read} | read_by_filter
            unread |= dict.fromkeys(c for c in one.stored.column_names if c not in known)
        return list(unread)


def outcomes(sources: Sequence[OneSource]) -> dict[str, int]:
    """How many of the sources' rows came to which outcome."""
    found = Counter[str]()
    for source in sources:
        for one in source.loaded.values():
            found.update(one.tokenized.counts)
    return {outcome.name.lower(): found[outcome.name.lower()] for outcome in Outcome}


def left_out(sources: Sequence[OneSource]) -> "dict[str, LeftOut]":
    """What of sources' rows the chat template does not write, by what it is; of several splits and
    sources the rows together."""
    found: dict[str, LeftOut] = {}
    for source in sources:
        for one in source.loaded.values():
            for label, part in one.tokenized.left_out.items():
                before = found.get(label)
                rows = part.rows + (before.rows if before else 0)
                found[label] = replace(before or part, rows=rows)
    return found


def _numbered(pairs: "Dataset", first: int) -> "Dataset":
    """Pairs whose rows are numbered on from a number."""
    from datasets import Dataset, Features, concatenate_datasets

    if first == 0:
        return pairs
    numbers = np.asarray(pairs.with_format("numpy")["row"][:]) + first
    column = Dataset.from_dict({"row": numbers}, Features({"row": pairs.features["row"]}))
    return concatenate_datasets([pairs.remove_columns("row"), column], axis=1)
