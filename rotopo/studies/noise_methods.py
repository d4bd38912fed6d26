"""What the noise study compares, and what comes out of a run."""

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import rotopo.objectives
from rotopo.errors import InputError
from rotopo.objectives import DPO
from rotopo.objectives.base import PreferenceModule, in_range, positive

_FILTER, _SAMPLING = "+filter", "+sampling"


@dataclass(frozen=True)
class Method:
    """An objective, and how much of ROPO's procedure is around it.

    Attributes:
        name: as results name it: the class, or ``cDPO`` for DPO with label smoothing; with
            ``+filter`` or ``+filter+sampling`` behind it.
        objective: the class.
        filtered: train in rounds, each on the pairs that the last one's policy finds likely.
        sampled: take in new pairs for the prompts that were dropped.
    """

    name: str
    objective: type[PreferenceModule]
    filtered: bool = False
    sampled: bool = False

    @classmethod
    def named(cls, name: str) -> "Method":
        """A method from its name, or from an objective's class path.

        Raises:
            InputError: there is no such objective, or the procedure's name is not one.
        """
        objective = name.removesuffix(_SAMPLING)
        sampled = objective != name
        alone = objective.removesuffix(_FILTER)
        filtered = alone != objective
        if sampled and not filtered:
            raise InputError(
                f"objective: {name}: sampling needs the filter: {alone}+filter+sampling."
            )
        path, _, short = alone.rpartition(".")
        found: object = None
        if alone == "cDPO":
            found = DPO
        elif path:
            try:
                found = getattr(importlib.import_module(path), short, None)
            except (ImportError, TypeError) as error:  # TypeError: a path that begins with a dot
                raise InputError(f"objective: {alone}: {error}: name a class path.") from error
        elif alone in rotopo.objectives.__all__:
            found = getattr(rotopo.objectives, alone)
        if not inspect.isclass(found) or not issubclass(found, PreferenceModule):
            raise InputError(
                f"objective: {alone} is no objective: name cDPO, a class path, or one of "
                f"{', '.join(rotopo.objectives.__all__)}, with +filter or +filter+sampling behind "
                "it for ROPO's procedure."
            )
        return cls(name.removeprefix(f"{path}."), found, filtered, sampled)

    @property
    def procedure(self) -> str:
        """What stands behind the objective in the name."""
        return _FILTER * self.filtered + _SAMPLING * self.sampled

    @property
    def is_cdpo(self) -> bool:
        """Whether it is DPO with label smoothing."""
        return self.objective is DPO and self.name.removesuffix(self.procedure) == "cDPO"

    def settings(self, flip_rate: float, **settings: Any) -> dict[str, Any]:
        """The objective's settings. cDPO, and what has one ``flip_rate`` (rDPO), gets the true one.

        Args:
            flip_rate: of the data.
            **settings: those that the class declares itself are passed on.
        """
        declared = inspect.signature(self.objective).parameters
        given = {
            name: value
            for name, value in (settings | {"flip_rate": flip_rate}).items()
            if name in declared
        }
        if self.is_cdpo:
            given["label_smoothing"] = flip_rate
        return given

    def build(self, flip_rate: float, **settings: Any) -> PreferenceModule:
        """The objective, with its :meth:`settings`.

        Raises:
            InputError: a setting out of its range, or one missing, or a filter that cannot rank
                pairs by the objective's losses.
        """
        try:
            module = self.objective(**self.settings(flip_rate, **settings))
        except TypeError as error:
            raise InputError(
                f"objective: {self.name}: {error}: only classes whose settings have defaults can "
                "be named here."
            ) from error
        if self.filtered and module.couples_pairs:
            raise InputError(
                f"objective: {self.name}: the loss of a pair depends on the pairs beside it, so "
                "that a filter cannot rank them by it: leave the filter out."
            )
        return module


@dataclass(frozen=True)
class TaskSettings:
    """What every task lets be set.

    Args:
        beta: β of the objectives that hold the policy to a reference; others (SimPO, ...) keep
            their own.
        epochs: passes over the training pairs; with the procedure those of all rounds together.
        rounds: T of the procedure.
        rho: ρ, the share of the pairs that the filter drops.
        samples: K, responses drawn for each dropped prompt.
        temperature: τ at which they are drawn.
        quantile: q, of the kept pairs' losses, up to which a new pair is accepted.

    Raises:
        InputError: a setting out of its range.
    """

    beta: float = 0.1
    epochs: int = 40
    rounds: int = 4
    rho: float = 0.2
    samples: int = 8
    temperature: float = 1.0
    quantile: float = 0.5

    def __post_init__(self) -> None:
        for name in ("beta", "epochs", "rounds", "samples", "temperature"):
            positive(name, getattr(self, name))
        in_range("rho", self.rho, 0, 1)
        if not 0 <= self.quantile <= 1:
            raise InputError(f"quantile is {self.quantile}: it has to be from 0 to 1.")
        if self.epochs % self.rounds:
            raise InputError(
                f"epochs is {self.epochs} and rounds {self.rounds}: the epochs have to divide "
                "evenly among the rounds."
            )


@dataclass(frozen=True)
class Round:
    """What happened to the data after a round of training.

    Attributes:
        round: from 1.
        dropped: pairs that the filter left out.
        flipped: how many of these have a flipped label.
        accepted: new pairs.
        right: how many of these are in the order of r*; None where there is no r*.
    """

    round: int
    dropped: int
    flipped: int
    accepted: int
    right: int | None


@dataclass(frozen=True)
class Outcome:
    """What came out of one run.

    Attributes:
        accuracy: share of clean held-out pairs whose margin is above zero.
        auroc, recall: of :func:`rotopo.robust.flips.flip_detection` on the training pairs; None
            where none is flipped.
        rounds: of the procedure.
    """

    accuracy: float
    auroc: float | None
    recall: float | None
    rounds: list[Round] = field(default_factory=list)
