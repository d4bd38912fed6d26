"""RewardModule: pairs through a scorer, and the loss of a reward model on their rewards."""

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rotopo.callbacks import (
    CompileLayers,
    ImplicitRewards,
    Orthogonality,
    PairScores,
    PredictionWriter,
    Speed,
)
from rotopo.data.batch import PairBatch, PromptBatch, Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.outcome import PairOutcome, StepOutput
from rotopo.models.settings import BackboneConfig
from rotopo.reward.losses import length_adjusted, pairwise_loss
from rotopo.run.as_adapter import from_runs
from rotopo.training import PairwiseModule

if TYPE_CHECKING:  # else rotopo --help would wait for PEFT and transformers
    from rotopo.models.scorer import Scorer


class RewardModule(PairwiseModule):
    """A reward model: a scalar head on a language model, trained on pairs.

    The loss is −log σ(r_w − r_l − margin) + η_c (r_w + r_l)² + η_2 (r_w² + r_l²), see
    :mod:`rotopo.reward.losses`. Prediction returns the rewards of given responses.

    Args:
        backbone: the model, its adapter, and how both are loaded. A language model gets a new
            head; somebody's reward model keeps its own, which is read at the end of the turn, as
            ours are: where the chat template writes on behind it (ChatML's line feed) and its
            maker reads there, rewards differ from the maker's.
        margin: what the chosen's reward has to be above the rejected's by, in addition to
            ``data.margin``.
        centering: η_c, which keeps the rewards' sum near zero (TRL's
            ``center_rewards_coefficient``).
        l2: η_2, which keeps rewards small; half of align-anything's ``regularization``.
        length_alpha: α of r / (α + len), in tokens, instead of the head's r; None leaves r. Such
            rewards are smaller by about the responses' length.
        length_penalty: λ of r − λ |len − L0|, in reward per token.
        length_target: L0, in tokens.
        optimizer: any optimiser by class path, with its settings.
        scheduler: any learning-rate scheduler by class path, stepped once per optimiser step.
        parameter_groups: settings of the optimiser for some parameters, by regular expressions in
            their names, see :class:`~rotopo.training.PairwiseModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = Needs(reference=False, ends=True, margins=True)

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (frozen)
        margin: float = 0.0,
        centering: float = 0.0,
        l2: float = 0.0,
        length_alpha: float | None = None,
        length_penalty: float = 0.0,
        length_target: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        parameter_groups: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, parameter_groups)
        for name, value in (
            ("margin", margin),
            ("centering", centering),
            ("l2", l2),
            ("length_alpha", length_alpha or 0.0),
            ("length_penalty", length_penalty),
            ("length_target", length_target),
        ):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}: it has to be at least 0.")
        if length_target and not length_penalty:
            raise InputError(
                f"length_target is {length_target}, but length_penalty is 0: without a penalty no "
                "length is aimed at."
            )
        self.backbone_config = backbone
        self.margin = margin
        self.centering = centering
        self.l2 = l2
        self.length_alpha = length_alpha
        self.length_penalty = length_penalty
        self.length_target = length_target
        self.scorer: Scorer | None = None

    @property
    def model_config(self) -> BackboneConfig:
        return self.backbone_config

    @property
    def backbone(self) -> "Scorer":
        assert self.scorer is not None
        return self.scorer

    def configure_model(self) -> None:
        from rotopo.models.scorer import Scorer

        if self.scorer is None:
            self.scorer = Scorer.load(from_runs(self.backbone_config), self.sharding)

    def always_on(self) -> list[Callback]:
        return [
            ImplicitRewards(),
            Orthogonality(),
            Speed(),
            PairScores(),
            PredictionWriter(),
            CompileLayers(),
        ]

    def response_lengths(self, batch: PairBatch) -> Tensor:
        return batch.lengths - 1  # a token follows that is no part of the response

    def response_rewards(self, batch: PairBatch) -> Tensor:
        """The reward of every response of a batch [S], length remedies included."""
        assert self.scorer is not None
        return length_adjusted(
            self.scorer(batch),
            self.response_lengths(batch),
            self.length_alpha,
            self.length_penalty,
            self.length_target,
        )

    def predict(self, batch: PromptBatch | PairBatch) -> list[dict[str, Any]]:
        """The reward of each row's response; rows have one each.

        Raises:
            InputError: prompts without a response.
        """
        if isinstance(batch, PromptBatch):
            raise InputError(
                "A reward model writes no responses: name a file of them in data.score, which it "
                "scores."
            )
        return [{"score": reward} for reward in self.response_rewards(batch).tolist()]

    def _step(self, batch: PairBatch) -> StepOutput:
        rewards = self.response_rewards(batch)
        chosen = rewards[batch.responses(Role.CHOSEN)]
        rejected = rewards[batch.responses(Role.REJECTED)]
        margin = self.margin + batch.margins.to(chosen.dtype)
        losses = pairwise_loss(chosen, rejected, margin, self.centering, self.l2)
        every = torch.ones_like(chosen, dtype=torch.bool)
        return self._output(
            batch,
            losses,
            PairOutcome(losses.detach(), chosen.detach(), rejected.detach(), every, every),
        )
