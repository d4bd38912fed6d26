"""Noise detection: do the margins of training pairs give away which labels were flipped?"""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rotopo.errors import InputError
from rotopo.robust.flips import FlipDetection
from rotopo.robust.scoring import require_pairs, scored
from rotopo.run.lightning import data_of


class NoiseDetection(Callback):
    """Scores all training pairs at the end of epochs, and logs what their margins say of flips.

    ``noise/auroc``, ``noise/recall``, ``noise/precision`` and ``noise/fitted``, see
    :func:`rotopo.robust.flips.flip_detection`. For any objective and for reward models, on data
    with ``data.noise``; the accuracy on clean pairs beside them is ``val/rewards/accuracy``, since
    held-out pairs are never flipped. An evaluation costs a forward pass over the training pairs,
    and the reference's unless that is cached.

    Args:
        every_n_epochs: at the end of every so many epochs, and of the last, also where training is
            stopped early.
        rho: ρ, the share of pairs that a filter would drop, for the precision.

    Raises:
        InputError: the data has no noise of which the flips are known, or rows are unpaired.
    """

    metric_names = tuple(f"noise/{name}" for name in ("auroc", "recall", "precision", "fitted"))

    def __init__(self, every_n_epochs: int = 1, rho: float = 0.2) -> None:
        if every_n_epochs < 1 or not 0 <= rho <= 1:
            raise InputError(
                f"NoiseDetection: every_n_epochs is {every_n_epochs} and rho {rho}: give at least "
                "1, and a share from 0 to 1."
            )
        self.every_n_epochs = every_n_epochs
        self.metric = FlipDetection(rho)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        if data.pairs.flipped() is None:
            raise InputError("NoiseDetection: no label is known to be flipped: set data.noise.")
        require_pairs(data.rows("train"), "NoiseDetection")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if done % self.every_n_epochs and not last and not trainer.should_stop:
            return
        data = data_of(trainer)
        flipped = torch.from_numpy(data.pairs.flipped())
        self.metric.reset()
        for places, values in scored(trainer, data.rows("train"), "Looking for flipped labels"):
            self.metric.update(places, values[:, 1] - values[:, 2], flipped[places])
        if trainer.world_size > 1:  # where the ranks exchange it
            self.metric.to(pl_module.device)
        for name, value in self.metric.compute().items():
            pl_module.log(f"noise/{name}", value)
