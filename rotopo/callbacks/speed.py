"""Tokens and pairs per second."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rotopo.data.batch import PairBatch


class Speed(Callback):
    """Logs ``speed/pairs_per_second`` and ``speed/tokens_per_second`` of training, over all ranks.

    From the beginning of an optimiser step's first micro-batch to the end of its last; tokens are
    those computed, padding left out.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.tokens: Tensor | int = 0
        self.began = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.pairs, self.tokens, self.began = 0, 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        self.pairs += batch.n_pairs
        self.tokens += (batch.segment_ids >= 0).sum()  # read once a step: reading waits for a GPU
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        amounts = {"pairs": self.pairs, "tokens": int(self.tokens)}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        for name, amount in amounts.items():
            rate = amount * trainer.world_size / seconds
            pl_module.log(f"speed/{name}_per_second", rate, prog_bar=name == "pairs", batch_size=1)
