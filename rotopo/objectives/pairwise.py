"""Objectives on pairs, each a small class over a function of :mod:`rotopo.objectives.losses`."""

from typing import Any

from torch import Tensor

from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import losses
from rotopo.objectives.base import PreferenceModule, positive


class DPO(PreferenceModule):
    """Direct preference optimisation (Rafailov et al. 2023): −log σ(β·h).

    Trained through :class:`rotopo.rotation.RotationConfig` this is RoPO, weights-rotated
    preference optimisation (arXiv 2508.17637), whose loss is DPO's unchanged. The robust loss
    ROPO (arXiv 2404.04102) is another objective.

    Args:
        beta: β, how strongly the policy is held to the reference.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: beta is not above zero.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        return losses.dpo(chosen - rejected)

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return self.beta * log_probs.chosen_log_ratio, self.beta * log_probs.rejected_log_ratio
