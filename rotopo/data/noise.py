"""Label noise: training labels flipped as an annotator would err, the clean label kept beside."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from rotopo.data.values import number
from rotopo.errors import InputError

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset


@dataclass(frozen=True)
class TrainingPairs:
    """What label noise may depend on, for N training pairs.

    Attributes:
        rows: numbers of the pairs' rows in the source [N].
        chosen: tokens of the chosen responses, the end of turn included, 0 where an unpaired row
            has none [N].
        rejected: the same of the rejected responses [N].
        columns: by the name of a column of the source its values, by row.
    """

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    columns: Callable[[str], Mapping[int, Any]]

    def column(self, name: str) -> list[Any]:
        """Values of a column of the source, pair by pair [N].

        Raises:
            InputError: the source has no such column.
        """
        values = self.columns(name)
        return [values[row] for row in self.rows.tolist()]


class LabelNoise(ABC):
    """Flips the labels of training pairs: chosen becomes rejected, and rejected chosen.

    A new kind of noise is a subclass with the method ``flip_probabilities``; ``data.noise`` takes
    it by class path. Pair i is flipped iff u < p_i, with u uniform in [0, 1), which the seed draws
    for the pair's row in the source, whatever the other settings are. So a row that two runs share
    has the same u in both; and where no p_i falls as the rate rises, the flips of a lower rate are
    among those of a higher one: comparisons over rates are paired.

    Args:
        seed: seed of u, at least 0.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise InputError(f"data.noise.seed is {seed}: it has to be at least 0.")
        self.seed = seed

    @abstractmethod
    def flip_probabilities(self, pairs: TrainingPairs) -> np.ndarray:
        """p: how probable it is that each pair's label is flipped [N]."""

    def flips(self, pairs: TrainingPairs) -> np.ndarray:
        """Which labels are flipped [N].

        Raises:
            InputError: the noise does not suit the pairs, or ``flip_probabilities`` gives others
                than N numbers in [0, 1].
        """
        p = np.asarray(self.flip_probabilities(pairs))
        if p.shape != pairs.rows.shape or not ((p >= 0) & (p <= 1)).all():
            raise InputError(
                f"data.noise: flip_probabilities of {type(self).__name__} has to return a number "
                f"in [0, 1] for each of {len(pairs.rows)} pairs."
            )
        # Row i's draw is the generator's i-th, however many rows follow.
        u = np.random.default_rng(self.seed).random(pairs.rows.max() + 1)
        return u[pairs.rows] < p


class SymmetricFlips(LabelNoise):
    """An annotator who errs anywhere alike: p_i = rate.

    The random noise of ROPO (arXiv 2404.04102), at rates of 20 % and 40 %. Of unpaired rows
    desirable responses become undesirable, and the other way round.

    Args:
        rate: how probable a flip is, in [0, 1).
        seed: seed of the flips, at least 0.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.rate = _checked(rate)

    def flip_probabilities(self, pairs: TrainingPairs) -> np.ndarray:
        return np.full(len(pairs.rows), self.rate)


class LengthFlips(LabelNoise):
    """An annotator who falls for length: p_i = min(1, c·max(0, log(|l_i|/|w_i|))) [ours].

    Only labels against the longer response are flipped, |w| and |l| being the tokens of the
    chosen and the rejected one, and c ≥ 0 is solved so that the mean of p over the training pairs
    is the rate.

    Args:
        rate: expected share of all labels that are flipped, in [0, 1).
        seed: seed of the flips, at least 0.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.rate = _checked(rate)

    def flip_probabilities(self, pairs: TrainingPairs) -> np.ndarray:
        """p [N].

        Raises:
            InputError: rows are unpaired, or too few rejected responses are the longer ones.
        """
        _require_two_responses(pairs, self)
        n = len(pairs.rows)
        excess = np.log(pairs.rejected / pairs.chosen).clip(min=0)
        largest = np.sort(excess[excess > 0])[::-1]
        if self.rate > len(largest) / n:
            raise InputError(
                f"data.noise.rate is {self.rate}, but LengthFlips can flip {len(largest) / n:.4g} "
                f"at most: of {n} training pairs {len(largest)} have a longer rejected response."
            )
        if len(largest) == 0:
            return excess
        # With c = 1/largest[k], the k pairs before k flip for certain, and k itself just so.
        rest = largest[::-1].cumsum()[::-1]
        expected = np.arange(len(largest)) + rest / largest
        k = min(int(np.searchsorted(expected, self.rate * n)), len(largest) - 1)
        return np.minimum(1, (self.rate * n - k) / rest[k] * excess)


class MarginFlips(LabelNoise):
    """A Bradley–Terry annotator who knows the true margins: p_i = σ(−m_i/T) [ours].

    The temperature T ≥ 0 is solved so that the mean of p over the training pairs is the rate; 0
    stands for the limit, in which labels follow the margins' signs. Where margins of both signs
    allow several T, it is one of them, always the same; and a pair with a negative margin is the
    less likely to flip the higher T is.

    Args:
        column: the column with the margin m of chosen over rejected: the difference of their true
            rewards, in any unit.
        rate: expected share of labels that are flipped, from the share of negative margins (and
            half of those that are 0) to below 1/2.
        seed: seed of the flips, at least 0.
    """

    def __init__(self, column: str, rate: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.column = column
        self.rate = _checked(rate)

    def flip_probabilities(self, pairs: TrainingPairs) -> np.ndarray:
        """p [N].

        Raises:
            InputError: rows are unpaired, a margin is no finite number, or no temperature gives
                the rate.
        """
        _require_two_responses(pairs, self)
        values = [(number(value), value) for value in pairs.column(self.column)]
        for row, (margin, value) in zip(pairs.rows.tolist(), values, strict=True):
            if margin is None:
                raise InputError(
                    f"data.noise: row {row} (from 0): {self.column} is {value!r}, which is no "
                    "finite number."
                )
        margins = np.array([margin for margin, _ in values], dtype=np.float64)
        lowest = float((1 - np.sign(margins)).mean() / 2)
        if not lowest <= self.rate < 0.5:
            raise InputError(
                f"data.noise.rate is {self.rate}, but with the margins in {self.column} "
                f"MarginFlips takes rates from {lowest:.4g}, the share of negative ones, to below "
                "0.5."
            )

        def p(inverse_temperature: float) -> np.ndarray:
            return np.exp(-np.logaddexp(0, inverse_temperature * margins))

        # At 0 the mean is 1/2; at 800 over the smallest margin every p is at its limit.
        sizes = np.abs(margins[margins != 0])
        low, high = 0.0, 800 / sizes.min()
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if p(middle).mean() > self.rate else (low, middle)
        return p(high)


class AssumedPreference(LabelNoise):
    """An annotator who takes the larger model's response to be the better one, unread.

    Of ROPO's four kinds of practical noise (arXiv 2404.04102, in the version of ICML) the only one
    whose definition we could read. A pair is flipped iff the model of its rejected
    response stands before that of its chosen one in the ranking. Pairs of one model, or with a
    model that the ranking leaves out, keep their labels [ours], and are counted. Nothing is left to
    chance.

    Args:
        chosen_model: the column with the name of the model that wrote the chosen response.
        rejected_model: the same for the rejected response.
        ranking: names of models, the one that is assumed to be better first.
    """

    def __init__(self, chosen_model: str, rejected_model: str, ranking: list[str]) -> None:
        super().__init__()
        if len(set(ranking)) < max(2, len(ranking)):
            raise InputError(
                f"data.noise.ranking is {ranking}: name at least two models, each once, the one "
                "that is assumed to be better first."
            )
        self.chosen_model = chosen_model
        self.rejected_model = rejected_model
        self.ranking = ranking

    def flip_probabilities(self, pairs: TrainingPairs) -> np.ndarray:
        """p, 0 or 1 [N].

        Raises:
            InputError: rows are unpaired, or no pair has two models of the ranking.
        """
        _require_two_responses(pairs, self)
        columns = self.chosen_model, self.rejected_model
        chosen, rejected = (
            np.array([self._place(model) for model in pairs.column(name)]) for name in columns
        )
        n, unranked = len(pairs.rows), np.isnan(chosen) | np.isnan(rejected)
        if unranked.all():
            raise InputError(
                f"data.noise.ranking: of none of {n} training pairs do {' and '.join(columns)} "
                f"both hold a model of {', '.join(self.ranking)}: write the names as they stand "
                f"there, such as {pairs.column(self.chosen_model)[0]!r:.60}."
            )
        rank_zero_info(
            f"data.noise: {unranked.sum()} of {n} pairs keep their labels for a model that is not "
            f"in the ranking, {(chosen == rejected).sum()} because both models are the same."
        )
        return (rejected < chosen).astype(np.float64)

    def _place(self, model: Any) -> float:
        return self.ranking.index(model) if model in self.ranking else np.nan


def with_flips(pairs: "Dataset", flipped: np.ndarray) -> "Dataset":
    """The pairs as a noisy annotator labels them, in memory.

    Args:
        pairs: columns ``chosen`` and ``rejected`` (token ids), and others, which stay.
        flipped: pairs that have the two exchanged [N]. A further column ``flipped`` holds it, from
            which the clean labels can be told.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset

    table, mask = pairs.with_format("arrow")[:], pa.array(flipped)
    chosen, rejected = table["chosen"], table["rejected"]
    swapped = {
        "chosen": pc.if_else(mask, rejected, chosen),
        "rejected": pc.if_else(mask, chosen, rejected),
        "flipped": mask,
    }
    names = [*pairs.column_names, "flipped"]
    columns = [swapped[name] if name in swapped else table[name] for name in names]
    return Dataset(pa.table(columns, names))


def _checked(rate: float) -> float:
    if not 0 <= rate < 1:
        raise InputError(f"data.noise.rate is {rate}: it has to be in [0, 1).")
    return rate


def _require_two_responses(pairs: TrainingPairs, noise: LabelNoise) -> None:
    single = int(((pairs.chosen == 0) | (pairs.rejected == 0)).sum())
    if single:
        raise InputError(
            f"data.noise: {type(noise).__name__} compares two responses, but {single} training "
            "rows have one: take SymmetricFlips."
        )
