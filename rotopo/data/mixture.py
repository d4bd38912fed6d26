"""Several sources in one epoch: how many pairs of each, which of them, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rotopo.errors import InputError


@dataclass(frozen=True)
class Share:
    """What a source gives to an epoch.

    Attributes:
        name: the source's.
        weight: its share of the pairs, in relation to the others' weights; None for none.
        repetitions: how often an epoch has each of its pairs, where there are no weights; of 2.5
            every second pair a third time, and the others in the next epoch.
    """

    name: str
    weight: float | None = None
    repetitions: float = 1.0


@dataclass(frozen=True)
class SourceMixture:
    """Rows of several sources, mixed.

    An epoch has a fixed number of pairs of each source. Every source goes through its own pairs in
    an order drawn anew for each pass, and goes on in the next epoch where it stopped; its pairs are
    spread evenly over the epoch. So of m sources with shares p, any first t pairs of an epoch have
    t·p pairs of a source, give or take (1 + m·p) / 2.

    With weights an epoch ends as the first source has been through all of its pairs.

    Attributes:
        shares: of each source.
        source_of: place in ``shares`` of each row's source [rows].
    """

    shares: Sequence[Share]
    source_of: np.ndarray

    @property
    def counts(self) -> list[int]:
        """Pairs of an epoch, by source.

        Raises:
            InputError: a source has no pairs for its share.
        """
        there = np.bincount(self.source_of, minlength=len(self.shares))
        if self.shares[0].weight is None:
            counts = [
                round(s.repetitions * int(n)) for s, n in zip(self.shares, there, strict=True)
            ]
        else:
            weights = np.array([share.weight for share in self.shares], dtype=np.float64)
            weights /= weights.sum()
            # The first source to end ends with a whole number of pairs, whatever rounding does.
            counts = np.floor(weights * (there / weights).min() + 1e-6).astype(int).tolist()
        for share, n, count in zip(self.shares, there.tolist(), counts, strict=True):
            if count == 0:
                raise InputError(
                    f"data.source: {share.name} with {n} training pairs gives none to an epoch: "
                    "raise its weight or repetitions, or leave it out."
                )
        return counts

    @property
    def most(self) -> int:
        """How often an epoch may have a row at most: it may begin within a pass."""
        there = np.bincount(self.source_of, minlength=len(self.shares)).tolist()
        return max(1 - (-count // n) for count, n in zip(self.counts, there, strict=True))

    def epoch(self, seed: int, epoch: int) -> list[int]:
        """The rows of an epoch in their order, a row as often as it comes.

        Args:
            seed: of the order.
            epoch: its number, from 0.
        """
        chosen, places = [], []
        for source, count in enumerate(self.counts):
            rows = np.flatnonzero(self.source_of == source)
            first, last = epoch * count // len(rows), ((epoch + 1) * count - 1) // len(rows)
            passes = [
                np.random.default_rng([seed, source, number]).permutation(rows)
                for number in range(first, last + 1)
            ]
            start = epoch * count - first * len(rows)
            chosen.append(np.concatenate(passes)[start : start + count])
            places.append((np.arange(count) + 0.5) / count)
        # A stable sort, so that sources that fall on one place keep their order.
        order = np.argsort(np.concatenate(places), kind="stable")
        return np.concatenate(chosen)[order].tolist()

    def describe(self) -> str:
        """What each source contributes, as one line."""
        there = np.bincount(self.source_of, minlength=len(self.shares)).tolist()
        counts = self.counts
        parts = [
            f"{share.name} {count} of {n} pairs ({100 * count / sum(counts):.1f} %)"
            for share, count, n in zip(self.shares, counts, there, strict=True)
        ]
        return f"an epoch has {sum(counts)} pairs: {', '.join(parts)}"
