"""The orthogonality error of every orthogonal adapter, logged while it trains."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rotopo.callbacks.measured import Measured
from rotopo.run.lightning import without_wrappers
from rotopo.run.steps import ends_step


class Orthogonality(Callback):
    """Logs max |RᵀR − I| of each adapted module, and ``orthogonality/max`` over them.

    For rotations, OFT, BOFT and HRA; silent for other adapters. R is exact up to 1024 inputs,
    beyond that 64 probe columns stand for it. A rotation is orthogonal by construction, so the
    error is a check on round-off, near 1e-7 in float32; it is no evidence that training went
    well.

    Args:
        every_n_steps: optimiser steps between two measurements in training.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.measured = Measured()

    def _log(self, module: LightningModule, each: bool = True) -> None:
        from rotopo.metrics.geometry import orthogonality_errors  # slow to import: PEFT

        name = "orthogonality"
        errors = self.measured(module.trainer, name, lambda: orthogonality_errors(module)) or {}
        if each:
            for name, error in errors.items():
                # The name of the layer in the model, without PEFT's, FSDP's and our own wrappers.
                layer = without_wrappers(name).rpartition("base_model.model.")[2]
                module.log(f"orthogonality/{layer}", error, batch_size=1)
        if errors:
            module.log("orthogonality/max", max(errors.values()), batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and trainer.global_step % self.every_n_steps == 0:
            self._log(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # of which nothing is logged
            self._log(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, each=False)  # the test prints what it logs
