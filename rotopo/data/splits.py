"""Who is held out: which of a source's rows are for training, for validation and for the test."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rotopo.data.settings import refuse
from rotopo.errors import InputError, at_once

if TYPE_CHECKING:  # else rotopo --help would wait for datasets
    from datasets import Dataset


@dataclass(frozen=True)
class Splits:
    """The settings that divide a source, as :class:`rotopo.data.module.PairwiseDataModule` has
    them.

    Raises:
        InputError: a fraction out of its range, or a split that is named twice.
    """

    source: str
    train_split: str
    validation: float | str
    test: float | str
    group_by: str | None
    seed: int

    def __post_init__(self) -> None:
        with at_once() as check:
            for name, fraction in self.held_out.items():
                if not isinstance(fraction, str) and not 0 <= fraction <= 1:
                    said = "give a fraction in [0, 1] or a split's name."
                    check(refuse, f"data.{name} is {fraction}: {said}")
        shares = sorted(f for f in self.held_out.values() if not isinstance(f, str))
        if sum(shares) >= 1 and shares not in ([0, 1], [1]):
            raise InputError("data.validation and data.test leave no pair to train on.")
        if len({name.partition("[")[0] for name in self.named}) < len(self.named):
            raise InputError(
                f"data.train_split, data.validation and data.test name the splits "
                f"{', '.join(self.named)}: each has to be another one; to hold out a part of a "
                "split, give a fraction."
            )

    @property
    def held_out(self) -> dict[str, float | str]:
        """A share of the training split, or a split of its own, by what it is for."""
        return {"validation": self.validation, "test": self.test}

    @property
    def named(self) -> list[str]:
        """The source's splits that are read."""
        return [self.train_split, *(s for s in self.held_out.values() if isinstance(s, str))]

    def choose(self, rows: "dict[str, Dataset]") -> dict[str, tuple[str, np.ndarray]]:
        """For train, validation and test: the source's split, and the numbers of its rows.

        Args:
            rows: of each of the ``named`` splits.

        Raises:
            InputError: a fraction leaves nothing on one of the sides, or two splits share a group.
        """
        pool = rows[self.train_split]
        labels = np.arange(len(pool)) if self.group_by is None else self._groups(pool)
        groups, group_of_row = np.unique(labels, return_inverse=True)
        order = self.permutation(len(groups))
        # Test groups come from one end and validation groups from the other, so that the size of
        # one does not change the other.
        ends = {"test": order, "validation": order[::-1]}
        sizes = np.bincount(group_of_row)
        rest = np.ones(len(pool), dtype=bool)
        chosen: dict[str, tuple[str, np.ndarray]] = {}
        if 1 in self.held_out.values():
            name = next(name for name, share in self.held_out.items() if share == 1)
            return {name: (self.train_split, np.arange(len(pool)))}
        for name, share in self.held_out.items():
            if isinstance(share, str):
                chosen[name] = share, np.arange(len(rows[share]))
            elif share > 0:
                wanted = max(1, round(share * len(pool)))
                n_groups = int(np.searchsorted(sizes[ends[name]].cumsum(), wanted)) + 1
                held_out = np.isin(group_of_row, ends[name][:n_groups])
                if not (rest & held_out).sum() == held_out.sum() < rest.sum():
                    raise InputError(
                        f"data.validation and data.test leave no pair to train on: {len(pool)} "
                        f"rows in {len(groups)} groups are too few for such fractions."
                    )
                rest &= ~held_out
                chosen[name] = self.train_split, np.flatnonzero(held_out)
        chosen = {"train": (self.train_split, np.flatnonzero(rest)), **chosen}
        self._check_groups(rows, chosen)
        return chosen

    def permutation(self, n: int) -> np.ndarray:
        """The numbers below n in the seed's order."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).numpy()

    def _groups(self, rows: "Dataset") -> np.ndarray:
        if self.group_by not in rows.column_names:
            raise InputError(
                f"data.group_by: {self.source} has no column {self.group_by!r}, only "
                f"{', '.join(rows.column_names)}."
            )
        return np.array([repr(value) for value in rows[self.group_by][:]])

    def _check_groups(
        self, rows: "dict[str, Dataset]", chosen: dict[str, tuple[str, np.ndarray]]
    ) -> None:
        """Splits that the source names may share groups, which no choice of ours can mend."""
        if self.group_by is None:
            return
        owner: dict[str, str] = {}
        for name, (split, numbers) in chosen.items():
            for group in np.unique(self._groups(rows[split])[numbers]).tolist():
                if owner.setdefault(group, name) != name:
                    raise InputError(
                        f"data.group_by: the {self.group_by} {group} is in {owner[group]} and in "
                        f"{name}: hold out fractions instead of the source's splits."
                    )
