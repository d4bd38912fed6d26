"""A loss and its gradient over the log-ratios of one pair."""

import torch
from torch import Tensor

from rotopo.data.batch import Role
from rotopo.models.log_probs import PairLogProbs, ResponseTokens
from rotopo.objectives.base import PreferenceModule

# log π_ref of both responses, nats: log-probs stay below 0 over the whole surface.
_REFERENCE = -6.0


def surface(objective: PreferenceModule, log_ratios: Tensor) -> Tensor:
    """Loss and its derivatives with respect to Δw and Δl, over all pairs of the values given.

    Every point is a batch of its own, of one row with responses of one token: objectives that
    compare rows (AOT, Dr. DPO) then have nothing to compare. What comes from other responses is
    neutral: KTO's mismatched log-ratio and TYPO's KL are 0, TPO's gold is as likely as under the
    reference, WPO's weights are 1 at Δ = 0.

    Args:
        objective: without a policy of its own.
        log_ratios: Δ, nats, from −6 to below 6 [n].

    Returns:
        [3, n, n]: the loss, ∂/∂Δw and ∂/∂Δl; rows are Δl, columns Δw.
    """
    objective = objective.eval()
    found = log_ratios.new_zeros(3, len(log_ratios), len(log_ratios))
    for i, rejected in enumerate(log_ratios):
        for j, chosen in enumerate(log_ratios):
            at = torch.stack([chosen, rejected]).requires_grad_()
            loss = objective.losses(objective.complete(_one_pair(at))).sum()
            (slope,) = torch.autograd.grad(loss, at)
            found[0, i, j], found[1:, i, j] = loss.detach(), slope
    return found


def _one_pair(log_ratios: Tensor) -> PairLogProbs:
    """One row, from (Δw, Δl)."""
    policy = log_ratios + _REFERENCE
    reference = torch.full_like(policy, _REFERENCE)
    one = torch.ones(1, dtype=torch.long)
    return PairLogProbs(
        chosen=policy[:1],
        rejected=policy[1:],
        chosen_length=one,
        rejected_length=one,
        reference_chosen=reference[:1],
        reference_rejected=reference[1:],
        mismatched_log_ratio=torch.zeros_like(reference),
        gold=reference[:1],
        gold_length=one,
        reference_kl=torch.zeros_like(reference[:1]),
        rows=torch.zeros_like(one),
        tokens=ResponseTokens(
            pair=torch.zeros(2, dtype=torch.long),
            role=torch.tensor([Role.CHOSEN, Role.REJECTED]),
            position=torch.zeros(2, dtype=torch.long),
            log_prob=policy,
            reference=reference,
            sum_squared=reference.exp(),
        ),
    )
