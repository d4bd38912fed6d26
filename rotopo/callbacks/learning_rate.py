"""The learning rate beside a step's other metrics."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LearningRate(Callback):
    """Logs the rate that a step is made with: ``lr-AdamW``, and of an optimiser with several groups
    of parameters ``lr-AdamW/pg1`` or the group's own name.

    The names are those of Lightning's LearningRateMonitor, which takes its place where
    ``trainer.callbacks`` has one. A module logs it by itself, in the step's own line of
    ``metrics.csv``, where Lightning's callback has a line of its own.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in trainer.optimizers:
            groups, name = optimizer.param_groups, f"lr-{type(optimizer).__name__}"
            for number, group in enumerate(groups, 1):
                own = f"/{group.get('name', f'pg{number}')}" if len(groups) > 1 else ""
                pl_module.log(f"{name}{own}", group["lr"], batch_size=1)
