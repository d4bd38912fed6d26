"""DPO with an eye on length: a price on tokens, or as many tokens of both responses."""

from typing import Any

import torch
from torch import Tensor

from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs, given, handed
from rotopo.objectives import losses
from rotopo.objectives.base import ReferenceObjective, positive


class LengthRegularizedDPO(ReferenceObjective):
    """R-DPO (Park et al. 2024): DPO with a price on length, −log σ(z + α(|w| − |l|)).

    Not rDPO, which is :class:`RobustDPO`, nor RoPO or ROPO. Rewards are β·Δ + α·length, the reward
    of which the loss is the maximum-likelihood fit.

    Args:
        beta: β, how strongly the policy is held to the reference.
        alpha: α > 0, nats of reward that a token costs [ours: .01. One repository, not
            the paper's, has .1, at which 100 tokens weigh what 100 nats of log-ratio do at β = .1].
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.alpha = positive("alpha", alpha)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = super().rewards(log_probs)
        extra = log_probs.chosen_length - log_probs.rejected_length
        return losses.length_regularized_dpo(chosen - rejected, extra, self.alpha)

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().rewards(log_probs)
        return (
            chosen + self.alpha * log_probs.chosen_length.to(chosen),
            rejected + self.alpha * log_probs.rejected_length.to(rejected),
        )


class SamPO(ReferenceObjective):
    """SamPO (Lu et al. 2024): DPO on as many tokens of the longer response as the shorter one has.

    The tokens are drawn afresh in each epoch, by the seed and the pair's place in the data, so
    that neither the batches nor a resumed run change the draw. [ours: how they are drawn, and that
    policy and reference are compared on the same tokens; the official code draws for each by
    itself, so that Δ at the start is noise and not 0]

    Args:
        beta: β, how strongly the policy is held to the reference.
        seed: seed of the draw.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    paired_rewards = True

    def __init__(self, beta: float = 0.1, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.seed = seed

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.dpo(self.margin(log_probs))

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return super().rewards(log_probs.weighted(handed(log_probs, "drawn")))

    def complete(self, log_probs: PairLogProbs) -> PairLogProbs:
        """With ``drawn`` [N]: 1 for tokens that are drawn in this epoch, 0 for the others."""
        tokens, rows = given(log_probs.tokens, "tokens"), given(log_probs.rows, "rows").tolist()
        epoch = self.current_epoch if self.training else -1
        shorter = torch.minimum(log_probs.chosen_length, log_probs.rejected_length).tolist()
        starts = (tokens.position == 0).nonzero().squeeze(1)
        ends = [*starts[1:].tolist(), len(tokens.position)]
        weights = []
        for start, end, pair, role in zip(
            starts.tolist(),
            ends,
            tokens.pair[starts].tolist(),
            tokens.role[starts].tolist(),
            strict=True,
        ):
            seed = hash((self.seed, epoch, rows[pair], role)) % 2**63
            generator = torch.Generator().manual_seed(seed)
            places = torch.randperm(end - start, generator=generator)[: shorter[pair]]
            weights.append(torch.zeros(end - start).index_fill_(0, places, 1.0))
        return log_probs.hand(drawn=torch.cat(weights).to(tokens.log_prob).detach())


class LDDPO(ReferenceObjective):
    """LD-DPO (Liu et al. 2024): DPO in which tokens beyond the shorter response's length weigh α.

    Args:
        beta: β, how strongly the policy is held to the reference.
        alpha: α from 0 (the tail does not count) to 1 (DPO).
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    paired_rewards = True

    def __init__(self, beta: float = 0.1, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is {alpha}: it has to be from 0 to 1.")
        self.beta = positive("beta", beta)
        self.alpha = alpha

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.dpo(self.margin(log_probs))

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        tokens = given(log_probs.tokens, "tokens")
        shorter = torch.minimum(log_probs.chosen_length, log_probs.rejected_length)
        whole = torch.ones_like(tokens.log_prob)
        weights = whole.where(tokens.position < shorter[tokens.pair], self.alpha)
        return super().rewards(log_probs.weighted(weights))
