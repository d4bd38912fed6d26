"""The settings of optimiser and schedule -> what Lightning steps."""

import math
import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter

from rotopo.callbacks.monitors import follows_metric
from rotopo.errors import InputError
from rotopo.refusals import naming
from rotopo.run.lightning import forget_train_loader


def configured(
    make_optimizer: OptimizerCallable | None,
    make_scheduler: LRSchedulerCallable | None,
    parameters: Iterator[tuple[str, Parameter]],
    trainer: Trainer | None,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns.

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
    optimizer = make_optimizer(groups_of(parameters))
    if make_scheduler is None:
        return {"optimizer": optimizer}
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
    return {"optimizer": optimizer, "lr_scheduler": config}


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
