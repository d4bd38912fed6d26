"""Where an optimiser step begins and ends among its micro-batches."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy

from rotopo.errors import InputError


def begins_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a micro-batch is the first of an optimiser step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a micro-batch is the last of an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def check_steps_are_whole(trainer: Trainer) -> None:
    """Check that steps are whole wherever training pauses.

    Raises:
        InputError: a setting of the Trainer would validate, or end an epoch, within a step.
    """
    accumulation = trainer.accumulate_grad_batches
    for name, batches in (
        ("val_check_interval", getattr(trainer, "val_check_batch", None)),
        ("limit_train_batches", trainer.num_training_batches),
    ):
        if batches not in (None, math.inf) and int(batches) % accumulation:
            raise InputError(
                f"trainer.{name} comes to {int(batches)} micro-batches, which is within an "
                f"optimiser step: make it a multiple of trainer.accumulate_grad_batches "
                f"({accumulation})."
            )


def works_in_steps_only(trainer: Trainer) -> bool:
    """Whether the model's weights are there only within a step: so with FSDP1, which gathers them
    in the module's own forward pass, and nowhere else."""
    return isinstance(trainer.strategy, FSDPStrategy)
