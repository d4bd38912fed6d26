"""Optimiser and schedule of a fit that goes on, as its settings have them.

Lightning gives both the numbers that the checkpoint's had, whatever the settings say now: the
learning rate, weight decay, a schedule's decay. Here they get what the settings would have made of
them by this step, and it is said. Only a schedule's length does not change by the way, because
the Trainer's number of steps has: it has to be asked for.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.nn import Parameter
from torch.optim import Optimizer

from rotopo.errors import InputError
from rotopo.run.settings import plain

# What a schedule that follows a metric remembers, beside its settings.
_RUNNING = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
# A curve of more steps than these is compared at as many of them.
_COMPARED = 100_000


@dataclass(frozen=True)
class Given:
    """What settings make of optimiser and schedule.

    Attributes:
        optimizer: class path.
        make_optimizer: makes one of groups of parameters.
        groups: these, with the parameters' names (``param_names``).
        scheduler: class path; None without a schedule.
        make_scheduler: makes it of an optimiser, and of a length where it has one.
        follows_metric: whether the schedule does.
        total_steps: its length; None where it has none.
        from_trainer: whether that is the Trainer's number of steps.
    """

    optimizer: str
    make_optimizer: Callable[[Any], Optimizer]
    groups: list[dict[str, Any]]
    scheduler: str | None = None
    make_scheduler: Callable[..., Any] | None = None
    follows_metric: bool = False
    total_steps: int | None = None
    from_trainer: bool = False

    def after(self, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The groups' settings and the schedule's state after some steps of it.

        Args:
            steps: 0 is at the beginning.
        """
        optimizer, schedule = self._made(self.total_steps)
        for _ in range(steps):
            _step(schedule)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return deepcopy(groups), deepcopy(schedule.state_dict()) if schedule else None

    def curve(self, total_steps: int | None, last: int) -> list[float]:
        """The first group's learning rate at each step up to the last, of a schedule so long."""
        optimizer, schedule = self._made(total_steps)
        rates = []
        for _ in range(last + 1):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            _step(schedule)
        return rates

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        groups, state = self.after(0)
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "total_steps": self.total_steps,
            "groups": plain(groups),
            "schedule": plain(state),
            "parameters": [list(group["param_names"]) for group in self.groups],
        }

    def _made(self, total_steps: int | None) -> tuple[Optimizer, Any]:
        """An optimiser of the same groups that trains nothing, and the schedule on it."""
        groups = [
            group | {"params": [Parameter(torch.zeros([1] * p.ndim)) for p in group["params"]]}
            for group in self.groups
        ]
        optimizer = self.make_optimizer(groups)
        if self.make_scheduler is None:
            return optimizer, None
        length = {} if total_steps is None else {"total_steps": total_steps}
        return optimizer, self.make_scheduler(optimizer, **length)


def _step(schedule: Any) -> None:
    if schedule is not None:
        with warnings.catch_warnings():  # of an optimiser that has not stepped
            warnings.simplefilter("ignore")
            schedule.step()


class Rates:
    """Optimiser and schedule as the settings give them, through a fit and its checkpoints."""

    def __init__(self) -> None:
        self.given: Given | None = None
        self._record: dict[str, Any] = {}
        self._then: Mapping[str, Any] | None = None  # what the checkpoint's record says
        self._groups: list[dict[str, Any]] = []  # the checkpoint's
        self._steps = 0  # of the schedule

    def take(self, given: Given) -> None:
        """Know the settings of the fit that begins or goes on.

        Raises:
            InputError: see :meth:`load`, whichever comes last.
        """
        self.given, self._record = given, given.record()
        self._check()

    def save(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        steps = trainer.estimated_stepping_batches
        return self._record | {"trainer_steps": None if steps == math.inf else int(steps)}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Know the checkpoint that a fit goes on from.

        Raises:
            InputError: it has an optimiser or a schedule of another class, or a schedule would
                get another length by the way.
        """
        states, schedules = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        self._groups = [dict(group) for group in states[0]["param_groups"]] if states else []
        steps = int(checkpoint["global_step"])
        self._steps = schedules[0].get("last_epoch", steps) if schedules else steps
        self._then = checkpoint["rotopo"].get("optimization") or {}
        self._check()

    def restore(self, trainer: Trainer) -> list[str]:
        """Give optimiser and schedule what the settings say, once Lightning has given them what
        the checkpoint says; what changed, in words.

        Args:
            trainer: at the start of training.
        """
        given, then = self.given, self._then
        self._then = None
        if given is None or then is None:
            return []
        beyond = self._beyond(given, then.get("trainer_steps"), trainer)
        if self._record == {k: v for k, v in then.items() if k != "trainer_steps"}:
            return beyond
        (optimizer,) = trainer.optimizers
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        groups, state = given.after(0 if given.follows_metric else self._steps)
        if given.follows_metric:
            for group, now, first in zip(
                groups, self._groups, then.get("groups") or self._groups, strict=True
            ):
                # As far down as the metric has brought it.
                lowered = now["lr"] / first["lr"] if "groups" in then and first["lr"] else None
                group["lr"] = now["lr"] if lowered is None else group["lr"] * lowered
            before = schedules[0].state_dict()
            running = {name: before[name] for name in _RUNNING if name in before}
            state = {**(state or {}), **running}
        elif not then and all(map(_same, groups, self._groups)):
            return beyond  # an earlier release's, as far as it tells the same
        if schedules:
            schedules[0].load_state_dict(state or {})
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        return _said(self._groups, groups, self._steps) + beyond

    def _beyond(self, given: Given, before: int | None, trainer: Trainer) -> list[str]:
        """What becomes of the rate where the run has another length than it had, and the schedule
        one of its own.

        Raises:
            InputError: the schedule ends before the run does, and takes no further step.
        """
        now = trainer.estimated_stepping_batches
        own = (
            given.make_scheduler is not None and not given.from_trainer and not given.follows_metric
        )
        if not own or before in (None, now) or now == math.inf or given.total_steps == now:
            return []
        last = min(int(now), self._steps + _COMPARED)
        try:
            rates = given.curve(given.total_steps, last)
        except ValueError as error:
            raise InputError(
                f"model.scheduler ({given.scheduler}) has a length of its own, and the run is now "
                f"longer, {now} steps ({before} before): {error}"
            ) from error
        return [
            f"the run was to take {before} steps and takes {now}, and model.scheduler has a length "
            f"of its own: the learning rate is {rates[min(before, last)]:.4g} at step "
            f"{min(before, last)} and {rates[last]:.4g} at step {last}."
        ]

    def _check(self) -> None:
        given, then = self.given, self._then
        if given is None or then is None:
            return
        for name in ("optimizer", "scheduler") if then else ():
            ours = getattr(given, name)
            if ours != then[name]:
                raise InputError(
                    f"model.{name} is {ours} here and {then[name]} in the checkpoint: the state of "
                    "one means nothing to another. Set it as in the checkpoint, or begin a new fit."
                )
        self._check_groups(given, then)
        if given.total_steps is None or not given.from_trainer:
            return
        old, new, done = then.get("total_steps"), given.total_steps, self._steps
        rate = float(self._groups[0]["lr"])
        if old is None:
            self._check_rate(rate, given.curve(new, done)[done])
        elif old != new:
            end = min(max(old, new), done + _COMPARED)
            before, after = given.curve(old, end), given.curve(new, end)
            if not all(map(_close, before[done:], after[done:])):
                raise InputError(
                    f"model.scheduler is as long as the run, which was to take {old} steps when "
                    f"this checkpoint was written and takes {new} here. The learning rate is "
                    f"{rate:.4g} at step {done}. It would go on to {before[min(old, end)]:.4g} at "
                    f"step {old}, as planned, and stay there; over {new} steps it would be "
                    f"{after[done]:.4g} at the next step. "
                    f"Ask for the one with --model.scheduler.total_steps {old}, for the other with "
                    f"--model.scheduler.total_steps {new}."
                )

    def _check_groups(self, given: Given, then: Mapping[str, Any]) -> None:
        """Refuse other groups of parameters, whose states are kept by their number."""
        ours = [list(group["param_names"]) for group in given.groups]
        theirs = then.get("parameters")
        if theirs is None:  # an earlier release's
            same = not self._groups or [len(group) for group in ours] == [
                len(group["params"]) for group in self._groups
            ]
        else:
            same = ours == theirs
        if not same:
            raise InputError(
                "model.parameter_groups: the patterns divide the parameters otherwise here than in "
                "the checkpoint, and the optimiser's state is kept by group. Keep the patterns "
                "(the settings of each may change), or begin a new fit."
            )

    def _check_rate(self, rate: float, expected: float) -> None:
        """As much as can be seen of another length in a checkpoint that does not tell it."""
        assert self.given is not None
        first = self._groups[0].get("initial_lr", rate)
        given = self._record["groups"][0]["initial_lr"]
        if not math.isclose(rate * given, expected * first, rel_tol=1e-6, abs_tol=1e-12):
            raise InputError(
                f"model.scheduler is as long as the run, {self.given.total_steps} steps, and after "
                f"{self._steps} of them the learning rate would be {expected * first / given:.4g}; "
                f"it is {rate:.4g} in this checkpoint of an earlier release: its run had another "
                "length, or other settings of the schedule. Ask for the length that you want with "
                "--model.scheduler.total_steps."
            )


def _said(before: list[dict[str, Any]], after: list[dict[str, Any]], steps: int) -> list[str]:
    """What of the optimiser's settings differs, in words."""
    found = {
        f"{name} {_shown(old[name])} -> {_shown(new[name])}": None
        for old, new in zip(before, after, strict=True)
        for name in new
        if name in old and not _same_value(old[name], new[name])
    }
    return [f"from step {steps} on the optimiser has {', '.join(found)}."] if found else []


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(_same_value(a[name], b[name]) for name in a.keys() & b.keys() - {"params"})


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return _close(a, b)
    return bool(a == b)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
