"""What callbacks only measure: left out where a model does not have it, and never a run's end."""

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rotopo import ranks
from rotopo.errors import InputError
from rotopo.pretrained import first_line

T = TypeVar("T")


class LeftOut(UserWarning):
    """A statistic that could not be had. An error in rotopo's own tests, which so find a statistic
    that fails on a model that has it."""


class Measured:
    """Takes statistics of a callback, and leaves one out for good once it has failed.

    It says so in one line, once. All ranks leave it out where one has to, so that they stay
    together in what they exchange; what is measured may itself exchange something as long as it
    fails on all ranks or on none.
    """

    def __init__(self) -> None:
        self.left_out: set[str] = set()

    def __call__(self, trainer: Trainer, name: str, measure: Callable[[], T]) -> T | None:
        """What ``measure`` returns; None where it fails or has failed before.

        Args:
            trainer: of the run, all of whose ranks call this.
            name: what is left out, in the line that says so.
            measure: raises what it likes.

        Raises:
            InputError: ``measure`` has refused a setting.
        """
        if name in self.left_out:
            return None
        value, cause = None, ""
        try:
            value = measure()
        except InputError:
            raise
        except Exception as error:  # whatever a model that nobody has seen makes of it
            cause = f"{type(error).__name__}: {first_line(error)}"
        if trainer.strategy.reduce_boolean_decision(not cause):
            return value
        self.left_out.add(name)
        causes = [cause for cause in ranks.of_all(cause) if cause]
        rank_zero_warn(
            f"{name}: left out of this run, since it cannot be had ({causes[0]}).",
            category=LeftOut,
        )
        return None
