"""The settings of optimiser and schedule -> what Lightning steps."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rotopo.callbacks.monitors import follows_metric
from rotopo.errors import InputError
from rotopo.muon import Muon as Muon  # known by this path
from rotopo.refusals import line, naming
from rotopo.run.lightning import forget_train_loader, without_wrappers
from rotopo.run.rates import Given

# Settings of an optimiser for the parameters in whose names a regular expression is found.
Patterns = Mapping[str, Mapping[str, Any]]
# Where nothing else is said: decay would pull rotations back to no rotation at all.
DEFAULT: Patterns = {r"\.rotation_": {"weight_decay": 0.0}}


class Warmup(LambdaLR):
    """Linear warm-up from near zero to the optimiser's learning rate, then a decay.

    Args:
        optimizer: the optimiser.
        warmup: share of all steps that the warm-up takes.
        decay: the shape of the rest; ``linear`` and ``cosine`` end at ``floor``.
        total_steps: optimiser steps in all; None takes the Trainer's number.
        floor: the share of the learning rate that the decay ends at.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.1,
        decay: Literal["constant", "linear", "cosine"] = "cosine",
        total_steps: int | None = None,
        floor: float = 0.0,
    ) -> None:
        if total_steps is None:
            raise InputError("Warmup: total_steps is not set and there is no Trainer to ask.")
        if not 0 <= warmup <= 1:
            raise InputError(
                f"model.scheduler.warmup is {warmup}: it is a share of all steps, from 0 to 1."
            )
        if not 0 <= floor <= 1:
            raise InputError(
                f"model.scheduler.floor is {floor}: it is a share of the rate, from 0 to 1."
            )
        warm_steps = math.ceil(warmup * total_steps)
        rest = max(1, total_steps - warm_steps)

        super().__init__(optimizer, _Factor(warm_steps, rest, decay, floor))


@dataclass
class _Factor:
    """What a warm-up's learning rate is multiplied by; an object, so that checkpoints tell it."""

    warm_steps: int
    rest: int
    decay: str
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warm_steps:
            return (step + 1) / (self.warm_steps + 1)
        done = min(1.0, (step - self.warm_steps) / self.rest)
        if self.decay == "constant":
            return 1.0
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * left


def configured(
    make_optimizer: OptimizerCallable | None,
    make_scheduler: LRSchedulerCallable | None,
    parameters: Iterable[tuple[str, Parameter]],
    trainer: Trainer | None,
    patterns: Patterns | None = None,
) -> tuple[dict[str, Any], Given]:
    """What ``configure_optimizers`` returns, and what it is made of.

    Args:
        make_optimizer: builds an optimiser of groups of parameters.
        make_scheduler: builds a schedule of an optimiser; None keeps the learning rate.
        parameters: the module's, by name.
        trainer: says how many steps there are, to a schedule that asks.
        patterns: settings of their own for some parameters, see :func:`groups_of`.

    Raises:
        InputError: a setting is missing, or does not go with the others.
    """
    if make_optimizer is None:
        raise InputError("model.optimizer is not set: name one, e.g. torch.optim.AdamW.")
    groups = groups_of(parameters, patterns)
    _check(patterns or {}, make_optimizer)
    make = partial(optimizer_of, make_optimizer)
    optimizer = make(groups)
    if isinstance(optimizer, Muon) and trainer and isinstance(trainer.strategy, FSDPStrategy):
        raise InputError(
            "model.optimizer (Muon) needs whole matrices, and torch's first FSDP holds parts of "
            "flattened ones: take configs/strategies/fsdp2.yaml or ddp.yaml."
        )
    given = Given(_name_of(optimizer), make, groups)
    if make_scheduler is None:
        return {"optimizer": optimizer}, given
    settings = getattr(make_scheduler, "keywords", {})  # of the partial that the CLI makes
    total: dict[str, Any] = {}
    if "total_steps" in settings and settings["total_steps"] is None:
        assert trainer is not None
        steps = trainer.estimated_stepping_batches
        if steps == math.inf:
            raise InputError(
                "model.scheduler: a run without an end (trainer.max_epochs, max_steps) gives "
                "it no number of steps: set model.scheduler.total_steps."
            )
        total["total_steps"] = int(steps)
        forget_train_loader(trainer)
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise InputError(
            f"model.optimizer ({type(optimizer).__name__}) has no lr for model.scheduler to "
            "change: set model.optimizer.lr, or model.scheduler to null."
        )
    scheduler = make_scheduler(optimizer, **total)
    with naming("model.scheduler, which checkpoints hold", on_purpose=False):
        scheduler.state_dict()
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if follows_metric(scheduler):
        config["monitor"] = getattr(scheduler, "monitor", None)
        if config["monitor"] is None:
            raise InputError(
                f"model.scheduler ({type(scheduler).__name__}) follows a metric, and its class "
                "has no setting to name one: write class_path: "
                "lightning.pytorch.cli.ReduceLROnPlateau, with init_args: {monitor: val/loss}."
            )
        # So that Lightning leaves it to MetricSchedules.
        config |= {"reduce_on_plateau": True, "frequency": sys.maxsize}
    given = replace(
        given,
        scheduler=_name_of(scheduler),
        make_scheduler=make_scheduler,
        follows_metric=follows_metric(scheduler),
        total_steps=total.get("total_steps", settings.get("total_steps")),
        from_trainer=bool(total),
    )
    return {"optimizer": optimizer, "lr_scheduler": config}, given


def _name_of(made: Any) -> str:
    return f"{type(made).__module__}.{type(made).__qualname__}"


def groups_of(
    parameters: Iterable[tuple[str, Parameter]], patterns: Patterns | None = None
) -> list[dict[str, Any]]:
    """What trains, in groups of the optimiser's.

    Args:
        parameters: by name; frozen ones are left out.
        patterns: regular expressions, each with the settings of the parameters whose name it is
            found in. Where several are found, each setting is that of the first that has it. The
            last of all is :data:`DEFAULT`.

    Returns:
        Groups as optimisers take them, with the parameters' names; those that no pattern is found
        in come first.

    Raises:
        InputError: a pattern is no regular expression, or is found in no name.
    """
    patterns = patterns or {}
    trained = {without_wrappers(name): p for name, p in parameters if p.requires_grad}
    for pattern in patterns:
        _check_pattern(pattern, list(trained))
    every = [*patterns.items(), *DEFAULT.items()]
    found: dict[tuple[int, ...], list[str]] = {}
    for name in trained:
        matched = tuple(at for at, (pattern, _) in enumerate(every) if re.search(pattern, name))
        found.setdefault(matched, []).append(name)
    groups = []
    for matched, names in sorted(found.items()):
        own: dict[str, Any] = {}
        for at in matched:
            rate = {"lr", "lr_ratio"} if own.keys() & {"lr", "lr_ratio"} else set()
            own |= {k: v for k, v in every[at][1].items() if k not in own.keys() | rate}
        if any(at < len(patterns) for at in matched):
            own["name"] = " and ".join(every[at][0] for at in matched)
        groups.append({"params": [trained[n] for n in names], "param_names": names, **own})
    return groups


def optimizer_of(make_optimizer: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimiser of groups of :func:`groups_of`, each with its learning rate.

    Raises:
        InputError: a group's ``lr_ratio`` has no learning rate to multiply.
    """
    optimizer = make_optimizer([dict(group) for group in groups])
    for group in optimizer.param_groups:
        group.pop("param_names", None)  # checkpoints know them otherwise
        ratio = group.pop("lr_ratio", None)
        if ratio is not None and group.get("lr") is None:
            raise InputError(
                f"model.parameter_groups: {type(optimizer).__name__} has no lr for lr_ratio to "
                "multiply: set model.optimizer.lr."
            )
        if ratio is not None:
            group["lr"] *= ratio
    return optimizer


def _check_pattern(pattern: str, names: list[str]) -> None:
    try:
        matches = any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise InputError(
            f"model.parameter_groups: {pattern!r} is no regular expression: {error}. It is looked "
            "for anywhere in a name, so lora_B is all whose name has lora_B in it."
        ) from error
    if not matches:
        some = names[:: max(1, len(names) // 6)][:6]
        raise InputError(
            f"model.parameter_groups: {pattern!r} is in no name of a parameter that trains. Some "
            f"of these {len(names)}: {', '.join(some)}."
        )


def _check(patterns: Patterns, make_optimizer: OptimizerCallable) -> None:
    """Refuse settings of groups that the optimiser would ignore, or not take as its own."""

    def made(**settings: Any) -> Optimizer:
        one = {"params": [Parameter(torch.zeros(1, 1))], "param_names": [""]}
        return make_optimizer([one], **settings)

    for pattern, own in patterns.items():
        place = f"model.parameter_groups: {pattern!r}"
        optimizer = made()
        for name in own.keys() - optimizer.defaults.keys() - {"lr_ratio"}:
            known = ", ".join(sorted([*optimizer.defaults, "lr_ratio"]))
            raise InputError(
                f"{place}: {type(optimizer).__name__} has no setting {name} for some of the "
                f"parameters. It has {known}."
            )
        if "lr_ratio" in own and "lr" in own:
            raise InputError(f"{place}: lr and lr_ratio say two things: leave one of them out.")
        ratio = own.get("lr_ratio", 1.0)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio < 0:
            raise InputError(f"{place}: lr_ratio is {ratio!r}: it is a number, 0 or above.")
        if getattr(make_optimizer, "keywords", None) is None:
            continue  # a function of the user's own, which takes no settings
        try:  # its class refuses what it would not take for all of them
            made(**{name: value for name, value in own.items() if name != "lr_ratio"})
        except (TypeError, ValueError) as error:
            raise InputError(f"{place}: {line(error)}") from error
