"""Callbacks that average values of pairs: over an optimiser step in training, else an epoch."""

import warnings
from abc import abstractmethod
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rotopo.data.batch import PairBatch
from rotopo.data.module import PairwiseDataModule
from rotopo.devices import for_float64
from rotopo.metrics.means import PairMeans
from rotopo.models.outcome import StepOutput
from rotopo.run.lightning import data_if_any
from rotopo.run.steps import ends_step

Values = dict[str, tuple[Tensor, Tensor]]


class PairMetricsCallback(Callback):
    """Logs means over pairs under ``train/``, ``val/`` and ``test/``, and under ``train/NAME/``
    and so on those over the pairs of each source or evaluation set, where the data names several.

    A subclass says what to average of what steps return.
    """

    on_progress_bar: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.training: PairMeans | None = None
        self.evaluation: PairMeans | None = None
        self.pair_metric_names: set[str] = set()  # of what it has seen, without the stage or a set

    @abstractmethod
    def values(self, output: StepOutput) -> Values | None:
        """A batch's values [B], and which rows have them [B], or [N] of response tokens; None where
        the objective has none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.training = self.evaluation = None

    def _add(
        self, trainer: Trainer, outputs: Any, batch: PairBatch, means: PairMeans | None, name: str
    ) -> PairMeans | None:
        module = trainer.lightning_module
        values = self.values(outputs)
        if values is not None:
            self.pair_metric_names |= values.keys()
            values = {**values, **_by_label(trainer, values, batch, name)}
            means = means or PairMeans(tuple(values))
            means.to(for_float64(module.device)).update(values)
        return means

    def _log(
        self, module: LightningModule, stage: str, means: PairMeans | None
    ) -> dict[str, Tensor] | None:
        if means is None or not means.update_called:
            return None
        values = means.compute()
        means.reset()
        for name, value in values.items():
            module.log(f"{stage}/{name}", value, prog_bar=name in self.on_progress_bar)
        return values

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.training = self._add(trainer, outputs, batch, self.training, "train")
        if ends_step(trainer, batch_idx):
            values = self._log(pl_module, "train", self.training)
            if values is not None:
                self.after_step(values)

    def after_step(self, means: dict[str, Tensor]) -> None:
        """What to do with the means of an optimiser step; nothing by default."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.evaluation = self._add(trainer, outputs, batch, self.evaluation, "validation")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "val", self.evaluation)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.evaluation = self._add(trainer, outputs, batch, self.evaluation, "test")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test", self.evaluation)


def _by_label(trainer: Trainer, values: Values, batch: PairBatch, name: str) -> Values:
    """Values of each source's or evaluation set's rows alone, by its name and theirs."""
    data = data_if_any(trainer)
    if not isinstance(data, PairwiseDataModule):
        return {}
    labels, found = data.pairs.parts[name].labelled(batch.rows), {}
    for label, own in labels.items():
        of_token = batch.pairs[batch.owners]
        masks = {of_token.shape: own[of_token], own.shape: own}
        for key, (value, has) in values.items():
            if has.shape in masks:  # not what a batch has one of
                found[f"{label}/{key}"] = value, has & masks[has.shape]
    return found


class ImplicitRewards(PairMetricsCallback):
    """Loss, rewards and log-probs.

    ``rewards/chosen`` and ``rewards/rejected`` are the objective's own implicit rewards (for DPO
    β·Δw and β·Δl) or a reward model's, ``rewards/margin`` their difference, ``rewards/accuracy``
    the share of pairs with a margin above zero, ``rewards/sum`` the chosen's plus the rejected's
    (what align-anything calls reward), ``logps/chosen`` and ``logps/rejected`` the log-prob per
    token in nats, which a reward model does not have. Of unpaired rows only the response that is
    there counts, and what compares two is not logged. ``router_loss`` of a mixture of experts,
    before its coefficient, is the mean over micro-batches, and no part of ``loss``.
    """

    on_progress_bar = ("loss", "rewards/margin", "rewards/accuracy")

    def values(self, output: StepOutput) -> Values:
        pairs = output["pairs"]
        chosen, rejected = pairs.chosen, pairs.rejected
        values = {
            "loss": (pairs.losses, pairs.has_chosen | pairs.has_rejected),
            "rewards/chosen": (chosen, pairs.has_chosen),
            "rewards/rejected": (rejected, pairs.has_rejected),
            "rewards/margin": (chosen - rejected, pairs.is_pair),
            "rewards/accuracy": (chosen > rejected, pairs.is_pair),
            "rewards/sum": (chosen + rejected, pairs.is_pair),
        }
        if pairs.log_probs is not None:
            values |= {
                "logps/chosen": (pairs.log_probs.chosen_mean, pairs.has_chosen),
                "logps/rejected": (pairs.log_probs.rejected_mean, pairs.has_rejected),
            }
        if "router_loss" in output:
            value = output["router_loss"].reshape(1)
            values["router_loss"] = (value, value.new_ones(1, dtype=torch.bool))
        return values


class Displacement(PairMetricsCallback):
    """Likelihood displacement: is the margin won by the chosen rising or the rejected falling?

    Logs the two parts of h = Δw − Δl in nats: ``displacement/chosen_up`` (Δw, the chosen's
    log-prob against the reference) and ``displacement/rejected_down`` (−Δl). Warns once when both
    responses have become less likely than under the reference, on average over ``window``
    optimiser steps. Silent for objectives without a reference.

    Args:
        window: optimiser steps that the warning looks back on.
        least: fall of the chosen's log-prob, in nats, below which no warning is given.
    """

    names = ("displacement/chosen_up", "displacement/rejected_down")

    def __init__(self, window: int = 20, least: float = 1.0) -> None:
        super().__init__()
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)
        self.least = least
        self.warned = False

    def values(self, output: StepOutput) -> Values | None:
        log_probs = output["pairs"].log_probs  # a reward model has none
        if log_probs is None or log_probs.reference_chosen is None:
            return None
        return {
            "displacement/chosen_up": (log_probs.chosen_log_ratio, log_probs.has_chosen),
            "displacement/rejected_down": (-log_probs.rejected_log_ratio, log_probs.has_rejected),
        }

    def after_step(self, means: dict[str, Tensor]) -> None:
        if self.warned or not means.keys() >= set(self.names):  # of one kind of unpaired rows
            return
        up, down = (float(means[name]) for name in self.names)
        self.recent.append((up, down))
        if len(self.recent) < (self.recent.maxlen or 0):
            return
        up = sum(u for u, _ in self.recent) / len(self.recent)
        down = sum(d for _, d in self.recent) / len(self.recent)
        if up < -self.least and down > 0:
            self.warned = True
            warnings.warn(
                f"Likelihood displacement: over the last {len(self.recent)} steps the chosen "
                f"responses' log-prob lies {-up:.1f} nats below the reference's and the "
                f"rejected's {down:.1f} below. The margin grows by pushing the rejected down, and "
                "the chosen go with them. A lower learning rate, a higher beta, or an objective "
                "that holds the chosen up counters it.",
                stacklevel=2,
            )
