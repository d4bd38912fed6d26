"""What a step says of its pairs: the one output that callbacks, filters and reports read."""

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor

from rotopo.models.log_probs import PairLogProbs


@dataclass(frozen=True)
class PairOutcome:
    """Of the B rows of a batch, all without gradient.

    Attributes:
        losses: each row's loss, in nats [B].
        chosen, rejected: rewards of its responses [B].
        has_chosen, has_rejected: which rows have that response [B].
        log_probs: what an objective's losses and rewards are functions of; None for reward models.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor
    has_chosen: Tensor
    has_rejected: Tensor
    log_probs: PairLogProbs | None = None

    @property
    def is_pair(self) -> Tensor:
        """Which rows have both responses [B]."""
        return self.has_chosen & self.has_rejected


class StepOutput(TypedDict):
    """What every step of a module returns; ``loss`` is what is trained on.

    ``router_loss`` is the load-balancing loss of a mixture of experts, before its coefficient.
    """

    loss: Tensor
    pairs: PairOutcome
    router_loss: NotRequired[Tensor]
