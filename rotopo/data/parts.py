"""What several sources give to training, to validation or to the test, numbered through."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from rotopo.data.mixture import Share, SourceMixture
from rotopo.data.one_source import OneSource
from rotopo.data.rows import unpaired_rows
from rotopo.errors import InputError

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset


class Part(NamedTuple):
    """What one source gives.

    Attributes:
        source: the source.
        split: its split.
        label: what the part's own metrics are called by; None where it has none.
        first: the number of the split's first row here.
        end: one more than that of its last.
    """

    source: OneSource
    split: str
    label: str | None
    first: int
    end: int

    @property
    def name(self) -> str:
        """The source's, with the label before it where that is another: held_out/films."""
        own = self.source.name
        return own if self.label in (None, own) else f"{self.label}/{own}"


@dataclass(frozen=True)
class Parts:
    """The parts of training, of validation or of the test, in the order of their rows' numbers."""

    parts: Sequence[Part]

    def __len__(self) -> int:
        return len(self.parts)

    def of_rows(self, rows: "Sequence[int] | np.ndarray") -> np.ndarray:
        """Place of the part that each row belongs to [N].

        Args:
            rows: their numbers [N].
        """
        firsts = [part.first for part in self.parts]
        return np.searchsorted(firsts, np.asarray(rows), side="right") - 1

    def part_of(self, row: int) -> Part:
        """The part that a row belongs to."""
        (place,) = self.of_rows([row])
        return self.parts[place]

    @property
    def names(self) -> list[str]:
        """The labels that there are, each once."""
        return list(dict.fromkeys(part.label for part in self.parts if part.label is not None))

    def labelled(self, rows: Tensor) -> dict[str, Tensor]:
        """Which rows have each label [N]; empty where no part has one.

        Args:
            rows: their numbers [N].
        """
        found: dict[str, Tensor] = {}
        for part in self.parts:
            if part.label is not None:  # by comparison: a step waits for no copy to its device
                own = (rows >= part.first) & (rows < part.end)
                found[part.label] = found[part.label] | own if part.label in found else own
        return found

    def labels(self, rows: Sequence[int]) -> dict[int, str]:
        """The label of each row; empty where no part has one."""
        if not self.names:
            return {}
        places = self.of_rows(rows).tolist()
        return {row: str(self.parts[at].label) for row, at in zip(rows, places, strict=True)}

    def in_words(self) -> str:
        """Which numbers are whose rows."""
        return ", ".join(f"{p.name} from {p.first} to {p.end - 1}" for p in self.parts)

    def counts(self, rows: "Sequence[int] | np.ndarray") -> dict[str, int]:
        """How many of some rows each part has, by its name."""
        counts = np.bincount(self.of_rows(rows), minlength=len(self)).tolist()
        return {part.name: n for part, n in zip(self.parts, counts, strict=True)}

    def columns(
        self, rows: Sequence[int], columns: Sequence[str | None], setting: str
    ) -> dict[int, Any]:
        """The values of a column of each part, by row; nothing of parts without.

        Args:
            rows: their numbers.
            columns: of each part.
            setting: which names them.

        Raises:
            InputError: a source has no such column.
        """
        found: dict[int, Any] = {}
        numbers, places = np.asarray(rows), self.of_rows(rows)
        for place, (part, column) in enumerate(zip(self.parts, columns, strict=True)):
            if column is not None:
                own = numbers[places == place]
                stored = (own - part.first).tolist()
                values = part.source.column(part.split, column, stored, setting)
                found |= zip(own.tolist(), values, strict=True)
        return found

    def known(self, rows: Sequence[int], column: str) -> dict[int, Any]:
        """The values of a column by row, of the sources that have it.

        Args:
            rows: their numbers.
            column: the column.
        """
        stored = [part.source.loaded[part.split].stored for part in self.parts]
        columns = [column if column in one.column_names else None for one in stored]
        return self.columns(rows, columns, column)

    def groups(self, rows: Sequence[int]) -> dict[int, str] | None:
        """What each row belongs to by its source's ``group_by``, rows without one to themselves;
        None where no source has any."""
        columns = [part.source.settings.group_by for part in self.parts]
        if not any(columns):
            return None
        values = self.columns(rows, columns, "data.group_by")
        if len(self) == 1:
            return {row: str(value) for row, value in values.items()}
        # Sources of their own may use the same names.
        return {
            row: json.dumps([int(place), str(values[row]) if row in values else row])
            for row, place in zip(rows, self.of_rows(rows), strict=True)
        }

    def margins(self, rows: Sequence[int]) -> dict[int, Any] | None:
        """What the column for ``margin`` of each row's source holds, of sources that have one;
        None where none has."""
        columns = [part.source.settings.margin for part in self.parts]
        return self.columns(rows, columns, "data.margin") if any(columns) else None

    def mixture(self, pairs: "Dataset") -> SourceMixture | None:
        """How an epoch mixes pairs of these parts; None of a single part that it has once."""
        settings = [part.source.settings for part in self.parts]
        if len(settings) == 1 and settings[0].repetitions is None:
            return None
        shares = [
            Share(part.source.name, one.weight, 1.0 if one.repetitions is None else one.repetitions)
            for part, one in zip(self.parts, settings, strict=True)
        ]
        return SourceMixture(shares, self.of_rows(pairs["row"][:]))


def join(
    name: str, sources: Sequence[tuple[OneSource, str | None]]
) -> "tuple[Parts, Dataset] | None":
    """What sources give to something, and their pairs as one table; None where none gives any.

    Args:
        name: ``train``, ``validation`` or ``test``.
        sources: each with the label of its part.

    Raises:
        InputError: paired and unpaired sources for training; a source has no pair left.
    """
    from datasets import concatenate_datasets

    parts: list[Part] = []
    tables: list[Dataset] = []
    for source, label in sources:
        if name in source.chosen:
            split, _ = source.chosen[name]
            first = parts[-1].end if parts else 0
            end = first + len(source.loaded[split].stored)
            parts.append(Part(source, split, label, first, end))
            tables.append(source.pairs(name, first))
    if not parts:
        return None
    kinds = {unpaired_rows(table) > 0: part for part, table in zip(parts, tables, strict=True)}
    if len(kinds) > 1:
        raise InputError(
            f"data ({name}): {kinds[True].source.name!r} has rows with a single response, and "
            f"{kinds[False].source.name!r} only pairs: give sources of one kind."
        )
    return Parts(parts), concatenate_datasets(tables) if len(tables) > 1 else tables[0]
