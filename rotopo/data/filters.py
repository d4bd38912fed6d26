"""Which rows of a source are used: filters by class path."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rotopo.data.preference import Row
from rotopo.data.values import number
from rotopo.errors import InputError

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset


class RowFilter(ABC):
    """Chooses rows of a source before they are tokenised.

    A new filter is a subclass with the method ``keep``; ``data.filter`` takes it by class path.
    """

    # Columns that ``keep`` reads; None for all of a row, which takes longer.
    columns: tuple[str, ...] | None = None

    @abstractmethod
    def keep(self, row: Row) -> bool:
        """Whether a row is used."""

    def numbers(self, rows: "Dataset", source: str) -> np.ndarray:
        """Numbers of the rows that are kept, ascending.

        Args:
            rows: of the source, as stored.
            source: its name, for messages.

        Raises:
            InputError: a column is missing, a row cannot be judged, or none is kept.
        """
        name = type(self).__name__
        for column in self.columns or ():
            if column not in rows.column_names:
                raise InputError(
                    f"data.filter ({name}): {source} has no column {column!r}, only "
                    f"{', '.join(rows.column_names)}."
                )
        read = rows if self.columns is None else rows.select_columns(list(self.columns))
        kept = []
        for place, row in enumerate(read):
            try:
                if self.keep(row):
                    kept.append(place)
            except InputError as error:
                raise InputError(
                    f"data.filter ({name}): {source}, row {place} (from 0): {error}"
                ) from error
        if not kept:
            has = ", ".join(f"{column} {rows[0][column]!r:.60}" for column in self.columns or ())
            raise InputError(
                f"data.filter ({name}) keeps none of {source}'s {len(rows)} rows"
                f"{has and f', of which the first has {has}'}."
            )
        return np.array(kept)


class Among(RowFilter):
    """Keeps rows whose value in a column is one of several.

    Args:
        column: the column.
        values: its values to keep.
    """

    def __init__(self, column: str, values: Sequence[str | int | float | bool]) -> None:
        self.columns = (column,)
        self.values = list(values)

    def keep(self, row: Row) -> bool:
        (column,) = self.columns or ()
        return row[column] in self.values


class Between(RowFilter):
    """Keeps rows whose number in a column is within bounds, both included.

    Args:
        column: the column.
        least: the lower bound; None for none.
        most: the upper bound; None for none.
    """

    def __init__(self, column: str, least: float | None = None, most: float | None = None) -> None:
        self.columns = (column,)
        self.least = -np.inf if least is None else least
        self.most = np.inf if most is None else most

    def keep(self, row: Row) -> bool:
        (column,) = self.columns or ()
        return self.least <= _number(row, column) <= self.most


class Apart(RowFilter):
    """Keeps rows of which one column's number is above another's by at least so much: pairs that
    a judge scored clearly apart.

    Args:
        higher: the column of the higher number, of the chosen response's score say.
        lower: the column of the lower one.
        least: their difference at least.
    """

    def __init__(self, higher: str, lower: str, least: float) -> None:
        self.columns = (higher, lower)
        self.least = least

    def keep(self, row: Row) -> bool:
        higher, lower = self.columns or ()
        return _number(row, higher) - _number(row, lower) >= self.least


def _number(row: Row, column: str) -> float:
    value: Any = number(row[column])
    if value is None:
        raise InputError(f"{column} is {row[column]!r:.60}, which is no number.")
    return float(value)
