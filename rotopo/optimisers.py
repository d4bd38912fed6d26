"""The settings of optimiser and schedule -> what Lightning steps."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rotopo.callbacks.monitors import follows_metric
from rotopo.errors import InputError
from rotopo.refusals import naming
from rotopo.run.lightning import forget_train_loader
from rotopo.run.rates import Given


class Warmup(LambdaLR):
    """Linear warm-up from near zero to the optimiser's learning rate, then a decay.

    Args:
        optimizer: the optimiser.
        warmup: share of all steps that the warm-up takes.
        decay: the shape of the rest; ``linear`` and ``cosine`` end at zero.
        total_steps: optimiser steps in all; None takes the Trainer's number.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.1,
        decay: Literal["constant", "linear", "cosine"] = "cosine",
        total_steps: int | None = None,
    ) -> None:
        if total_steps is None:
            raise InputError("Warmup: total_steps is not set and there is no Trainer to ask.")
        if not 0 <= warmup <= 1:
            raise InputError(
                f"model.scheduler.warmup is {warmup}: it is a share of all steps, from 0 to 1."
            )
        warm_steps = math.ceil(warmup * total_steps)
        rest = max(1, total_steps - warm_steps)

        super().__init__(optimizer, _Factor(warm_steps, rest, decay))


@dataclass
class _Factor:
    """What a warm-up's learning rate is multiplied by; an object, so that checkpoints tell it."""

    warm_steps: int
    rest: int
    decay: str

    def __call__(self, step: int) -> float:
        if step < self.warm_steps:
            return (step + 1) / (self.warm_steps + 1)
        done = min(1.0, (step - self.warm_steps) / self.rest)
        if self.decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if self.decay == "linear" else 1.0


def configured(
    make_optimizer: OptimizerCallable | None,
    make_scheduler: LRSchedulerCallable | None,
    parameters: Iterator[tuple[str, Parameter]],
    trainer: Trainer | None,
) -> tuple[dict[str, Any], Given]:
    """What ``configure_optimizers`` returns, and what it is made of.

    Args:
        make_optimizer: builds an optimiser of groups of parameters.
        make_scheduler: builds a schedule of an optimiser; None keeps the learning rate.
        parameters: the module's, by name.
        trainer: says how many steps there are, to a schedule that asks.

    Raises:
        InputError: a setting is missing, or does not go with the others.
    """
    if make_optimizer is None:
        raise InputError("model.optimizer is not set: name one, e.g. torch.optim.AdamW.")
    groups = groups_of(parameters)
    own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    optimizer = make_optimizer(groups)
    given = Given(_name_of(optimizer), make_optimizer, own)
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


def groups_of(parameters: Iterator[tuple[str, Parameter]]) -> list[dict[str, Any]]:
    """What trains, in groups of the optimiser's: rotations have no weight decay, which would pull
    them back to no rotation at all."""
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    rotation = [p for name, p in trained if ".rotation_" in name]
    others = [p for name, p in trained if ".rotation_" not in name]
    groups: list[dict[str, Any]] = [{"params": others}] if others else []
    if rotation:
        groups.append({"params": rotation, "weight_decay": 0.0})
    return groups
