"""RoPO's diagnosis while it trains: do neurons and hidden states collapse?"""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rotopo.callbacks.measured import Measured
from rotopo.data.batch import PairBatch
from rotopo.errors import InputError
from rotopo.models.modes import evaluating
from rotopo.run.lightning import data_of
from rotopo.run.steps import ends_step, works_in_steps_only


class Geometry(Callback):
    """Measures the model on a fixed batch of held-out pairs, before training, during it and after.

    Logged to the run's loggers, LL a hidden layer's number of two digits (00 the embeddings):

    - ``geometry/effective_rank/LL``: of the hidden states of all tokens,
      :func:`rotopo.metrics.geometry.effective_rank`.
    - ``geometry/distance/LL``: mean over the tokens of ‖h − h_ref‖ / ‖h_ref‖, the reference being
      the model with its adapter off or the policy's frozen copy [ours: the paper compares
      pictures]. Not for full fine-tuning without a reference.
    - ``geometry/neuron_cosine``: mean |cos| between two neurons of an adapted weight with the
      adapter merged in, averaged over those weights; all linear layers of the decoder under full
      fine-tuning. For rotations constant by construction, see :mod:`rotopo.metrics.geometry`.
    - ``geometry/hyperspherical_energy``: of the same weights, their sum relative to its value
      before training.

    The last two are not measured where no adapted layer is a linear one, nor of quantised weights.
    What a model does not have is left out, which is said once. Nothing is measured under
    FSDPStrategy, which is refused. Source: the diagnosis of RoPO (arXiv 2508.17637).

    Args:
        pairs: held-out pairs of the fixed batch (training pairs where none are held out).
        every_n_steps: optimiser steps between two measurements.

    Raises:
        InputError: the strategy is FSDP1.
    """

    def __init__(self, pairs: int = 8, every_n_steps: int = 50) -> None:
        self.pairs = pairs
        self.every_n_steps = every_n_steps
        self.batch: PairBatch | None = None
        self.energy: float | None = None  # before training
        self.measured_at = -1
        self.measured = Measured()

    def state_dict(self) -> dict[str, Any]:
        return {"energy": self.energy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.energy = state_dict["energy"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if works_in_steps_only(trainer):
            raise InputError(
                "The Geometry callback cannot look at a model under FSDPStrategy: leave it out of "
                "trainer.callbacks, or take configs/strategies/fsdp2.yaml."
            )
        data = data_of(trainer)
        self.batch = data.probe(self.pairs).to(pl_module.device)
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step != self.measured_at:
            self._log(trainer, pl_module)

    @torch.no_grad()
    def _log(self, trainer: Trainer, module: Any) -> None:
        values: dict[str, float] = {}
        with evaluating(module.language_model):
            for name, measure in (
                ("geometry of hidden states", self._of_states),
                ("geometry of weights", self._of_weights),
            ):
                found = self.measured(trainer, name, partial(measure, trainer, module))
                values |= {} if found is None else found
        self.measured_at = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"geometry/{name}": value for name, value in values.items()},
                step=trainer.global_step,
            )

    def _of_states(self, trainer: Trainer, module: Any) -> dict[str, float]:
        from rotopo.metrics.geometry import effective_rank

        assert self.batch is not None
        values = {}
        with trainer.precision_plugin.forward_context():
            states = module.backbone.hidden_states(self.batch)
            reference = module.backbone.hidden_states(self.batch, reference=True)
        for layer, state in enumerate(states):
            values[f"effective_rank/{layer:02}"] = float(effective_rank(state))
            if reference is not None:
                norm = reference[layer].norm(dim=1)
                distance = (state - reference[layer]).norm(dim=1) / norm
                values[f"distance/{layer:02}"] = float(distance.mean())
        return values

    def _of_weights(self, trainer: Trainer, module: Any) -> dict[str, float]:
        from rotopo.metrics.geometry import hyperspherical_energy, merged_weights, neuron_cosine
        from rotopo.models.sharding import in_turn

        cosines, energy = [], 0.0
        # Weights that train are gathered one by one, as they are and not as they are computed with;
        # those under an adapter in groups, which together are a whole model.
        alone = not module.backbone.adapted
        for group in [None] if alone else in_turn(module.backbone):
            for weight in merged_weights(module.language_model, group):
                cosines.append(float(neuron_cosine(weight)))
                energy += float(hyperspherical_energy(weight))
        if not cosines:
            return {}
        self.energy = energy if self.energy is None else self.energy
        return {
            "neuron_cosine": sum(cosines) / len(cosines),
            "hyperspherical_energy": energy / self.energy,
        }
