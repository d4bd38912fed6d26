"""A loss or a gradient that is not finite ends a run before it spoils the weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from rotopo import ranks
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.run.checkpoints import kept_in, way_on
from rotopo.run.lightning import data_if_any

_NAMED = 20  # rows in a message


class Finite(Callback):
    """Stops a fit before an update whose loss or gradient norm is infinite or not a number.

    The weights stay those of the step before, and no checkpoint is written. All ranks stop
    together. It is looked at once in an optimiser step, at one wait for the device: at the loss of
    each of its micro-batches, and at the norm of all gradients as they are before clipping (of a
    divided model, of each rank's shares). Under ``trainer.precision: 16-mixed`` only at the loss,
    since the scaler of gradients leaves out the steps that overflow. Not at losses of validation.

    Raises:
        InputError: names the step, its rows, and the last good checkpoint.
    """

    def __init__(self) -> None:
        # Of the step at hand; on the device, since reading it waits for a GPU.
        self.losses: list[Tensor] = []
        self.rows: list[tuple[Tensor, Tensor]] = []  # of each micro-batch, with their losses
        self.of_batch: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses, self.rows = [], []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.of_batch = batch.rows

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        assert self.of_batch is not None
        self.rows.append((self.of_batch, pl_module.row_losses))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self.losses = torch.stack(self.losses), []
        rows, self.rows = self.rows, []
        scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        norm = losses.new_zeros(()) if scales else _norm(optimizer).to(losses.device)
        bad = torch.stack([~losses.isfinite().all(), ~norm.isfinite()]).int()
        bad_loss, bad_norm = trainer.strategy.reduce(bad, reduce_op="max").tolist()
        if bad_loss or bad_norm:
            raise InputError(_message(trainer, rows, bool(bad_loss)))


def _norm(optimizer: Optimizer) -> Tensor:
    """L2 norm of all gradients, in float32 at least; of divided ones this rank's shares."""
    from torch.distributed.tensor import DTensor  # slow to import, and not for help

    gradients = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        gradient = parameter.grad
        if gradient is not None:
            share = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            # The norm of numbers that float16 holds may be none that it holds.
            gradients.append(share.float() if share.dtype == torch.float16 else share)
    return torch.nn.utils.get_total_norm(gradients)


def _whose(trainer: Trainer) -> str:
    """Of several sources, whose rows have which numbers."""
    data = data_if_any(trainer)
    if not isinstance(data, PairwiseDataModule) or len(data.pairs.parts["train"]) == 1:
        return ""
    return f" ({data.pairs.parts['train'].in_words()})"


def _message(trainer: Trainer, rows: list[tuple[Tensor, Tensor]], bad_loss: bool) -> str:
    """What is not finite, where, and what to do; the same on all ranks, which call it together."""
    every = [row for of_batch, _ in rows for row in of_batch.tolist()]
    bad = [row for of_batch, losses in rows for row in of_batch[~losses.isfinite()].tolist()]
    found = ranks.of_all((every, bad))
    every, bad = (sorted(row for rank in found for row in rank[which]) for which in (0, 1))
    named = bad or every  # a loss may be more than the sum of its rows'
    shown = ", ".join(map(str, named[:_NAMED]))
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    of_rows = f"row{'s' * (len(named) > 1)} {shown}{more} of data.source{_whose(trainer)}"
    what = f"the loss of {of_rows}" if bad_loss else f"the norm of the gradient of {of_rows}"
    folder = kept_in(trainer)
    advice = way_on(Path(folder) if folder else None) if trainer.is_global_zero else None
    advice = trainer.strategy.broadcast(advice)
    return (
        f"optimiser step {trainer.global_step + 1}, epoch {trainer.current_epoch}: {what} is not "
        "finite, and the step was not made. Look at these rows, or lower the learning rate or clip "
        f"gradients (trainer.gradient_clip_val); {advice}."
    )
