"""Objectives that judge each response by itself, so that most also train on unpaired rows."""

from typing import Any, Literal

import torch
from torch import Tensor

from rotopo import ranks
from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs, given, handed
from rotopo.objectives import losses
from rotopo.objectives.base import (
    PreferenceModule,
    ReferenceObjective,
    either,
    positive,
)
from rotopo.run.lightning import data_if_any


def per_row(log_probs: PairLogProbs, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Each row's values summed over the responses that it has [B]."""
    return torch.where(log_probs.has_chosen, chosen, 0) + torch.where(
        log_probs.has_rejected, rejected, 0
    )


class KTO(ReferenceObjective):
    """KTO (Ethayarajh et al. 2024): a value function of gains and losses against a baseline z0.

    λ_D(1 − σ(βΔ − z0)) for a desirable response, λ_U(1 − σ(z0 − βΔ)) for an undesirable one; a
    row's loss is the mean over its responses. z0 = max(0, β·mean Δ) over responses to *other*
    prompts, without gradient: every row brings the responses of one other row along, which cost a
    pass of their own. Its scope is the micro-batches that all ranks compute at the same time, of
    which it is one mean, clamped afterwards; steps that leave them fewer than two rows on average
    are refused.

    Rows are pairs, each split into a desirable and an undesirable response, or unpaired
    (``prompt, completion, label``).

    Args:
        beta: β, how strongly the policy is held to the reference.
        desirable_weight: λ_D, the weight of desirable responses.
        undesirable_weight: λ_U, the weight of undesirable ones; the paper balances the two by how
            many there are of each.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range; in training, micro-batches of one row.
    """

    needs = Needs(pairs=False, roles=(Role.MISMATCHED,))
    couples_pairs = True

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.desirable_weight = positive("desirable_weight", desirable_weight)
        self.undesirable_weight = positive("undesirable_weight", undesirable_weight)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        total, count = handed(log_probs, "mismatched_total")
        baseline = (self.beta * total / count).clamp(min=0)  # z0
        chosen, rejected = self.rewards(log_probs)
        total = per_row(
            log_probs,
            self.desirable_weight * losses.kto(chosen - baseline),
            self.undesirable_weight * losses.kto(baseline - rejected),
        )
        return total / (log_probs.has_chosen.int() + log_probs.has_rejected.int())

    def complete(self, log_probs: PairLogProbs) -> PairLogProbs:
        """With ``mismatched_total`` [2]: the sum of all ranks' mismatched log-ratios, and how many
        there are, of which z0 is made."""
        ratios = given(log_probs.mismatched_log_ratio, "mismatched_log_ratio").detach()
        sums = torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
        return log_probs.hand(mismatched_total=ranks.total(sums))

    def on_train_start(self) -> None:
        super().on_train_start()
        data = data_if_any(self.trainer)
        accumulation = self.trainer.accumulate_grad_batches
        if data is not None and data.batching.pairs_per_step < 2 * accumulation:
            raise InputError(
                f"KTO: data.pairs_per_step ({data.batching.pairs_per_step}) over "
                f"trainer.accumulate_grad_batches ({accumulation}) leaves fewer than two rows at a "
                "time, from which z0 cannot be estimated: raise the one or lower the other, "
                "which data.token_budget finds where it is set: raise that."
            )


class BCO(ReferenceObjective):
    """BCO (Jung et al. 2024): a classifier of desirable against undesirable responses.

    −log σ(βΔ − δ) for a desirable response and −log σ(−(βΔ − δ)) for an undesirable one, added up
    over a row's responses. δ is the mean of both kinds' mean rewards over all steps so far, of all
    ranks [ours: it moves after each optimiser step, so that batches and ranks do not change it].

    Args:
        beta: β, how strongly the policy is held to the reference.
        reward_shift: use δ, as the paper; without it this is TRL's ``bco_pair``.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = Needs(pairs=False)
    reward_sums: Tensor

    def __init__(self, beta: float = 0.01, reward_shift: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.reward_shift = reward_shift
        # Rewards of chosen and of rejected responses, and how many of each there were.
        self.register_buffer("reward_sums", torch.zeros(2, 2, dtype=torch.float64))
        self._of_this_step = torch.zeros(2, 2, dtype=torch.float64)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        shift = handed(log_probs, "reward_shift").to(chosen)
        return per_row(log_probs, *losses.bco(chosen, rejected, shift))

    def complete(self, log_probs: PairLogProbs) -> PairLogProbs:
        """With ``reward_shift`` []: δ as the steps so far have left it."""
        return log_probs.hand(reward_shift=self.shift)

    @property
    def shift(self) -> Tensor:
        """δ; 0 before the first step."""
        sums, counts = self.reward_sums
        return (sums / counts.clamp(min=1)).mean()

    def observe(self, log_probs: PairLogProbs, step_ended: bool) -> None:
        if not self.reward_shift:
            return
        counts = torch.stack([log_probs.has_chosen.sum(), log_probs.has_rejected.sum()])
        rewards = torch.stack([values.sum() for values in self.rewards(log_probs)])
        self._of_this_step = self._of_this_step.to(rewards.device) + torch.stack([rewards, counts])
        if step_ended:
            self.reward_sums += ranks.total(self._of_this_step)
            self._of_this_step.zero_()


class NCA(ReferenceObjective):
    """NCA (Chen et al. 2024): noise-contrastive alignment, which also holds the chosen up.

    −log σ(βΔw) − ½log σ(−βΔw) − ½log σ(−βΔl), as TRL's ``nca_pair``.

    Args:
        beta: β, how strongly the policy is held to the reference.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = Needs(pairs=False)

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return per_row(log_probs, *losses.nca(*self.rewards(log_probs)))


class SPPO(ReferenceObjective):
    """SPPO (Wu et al. 2024) with hard labels: (Δw − 1/(2β))² + (Δl + 1/(2β))².

    As TRL's ``sppo_hard``. The official code halves both squares, and takes its targets from a
    judge's win rates, of which hard labels are the extremes: its loss and gradient are half of
    these, its minimum is the same. Adam does not feel the factor; gradient clipping, plain SGD and
    weights in a mixture do.

    Args:
        beta: β, of whose inverse the targets are half: the official .001 asks for Δ = ±500 nats,
            and the loss starts at 5e5.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = Needs(pairs=False)

    def __init__(self, beta: float = 0.001, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        target = 1 / (2 * self.beta)
        return per_row(
            log_probs,
            losses.sppo(log_probs.chosen_log_ratio, target),
            losses.sppo(log_probs.rejected_log_ratio, -target),
        )


class APO(ReferenceObjective):
    """APO (D'Oosterlinck et al. 2024): anchored, it says where each likelihood should go.

    ``zero`` raises the chosen and lowers the rejected, 1 − σ(βΔw) + σ(βΔl); ``down`` lowers both
    and the rejected more, σ(βΔw) + 1 − σ(z), for data that is worse than the policy. ``zero`` also
    takes unpaired rows (TRL's ``apo_zero_unpaired``).

    Args:
        beta: β, how strongly the policy is held to the reference.
        variant: ``zero`` or ``down``.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self, beta: float = 0.1, variant: Literal["zero", "down"] = "zero", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.variant = either("variant", variant, "zero", "down")
        self.needs = Needs(pairs=variant == "down")

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        if self.variant == "down":
            return losses.apo_down(chosen, rejected)
        return per_row(log_probs, *losses.apo_zero(chosen, rejected))


class SFT(PreferenceModule):
    """Supervised fine-tuning on the chosen responses: −c̄, the mean over each response's tokens.

    Rewards are the log-probs per token. An unpaired row without a chosen response has a loss of 0
    and counts in the mean, so that the more of them there are, the smaller the steps.

    Args:
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.
    """

    needs = Needs(reference=False, pairs=False)
    reward_unit = "nats per token"

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return -log_probs.chosen_mean

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return log_probs.chosen_mean, log_probs.rejected_mean
