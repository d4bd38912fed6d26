"""Objectives without a reference: functions of the policy's own log-probs."""

from typing import Any, Literal

from torch import Tensor

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.models.log_probs import PairLogProbs, given
from rotopo.objectives import losses
from rotopo.objectives.base import PreferenceModule, either, in_range, positive

_NO_REFERENCE = Needs(reference=False)


class SimPO(PreferenceModule):
    """SimPO (Meng et al. 2024): −log σ(β(c̄ − r̄) − γ), on log-probs per token.

    Rewards are β·c̄ and β·r̄.

    Args:
        beta: β, the scale of the rewards.
        gamma: γ, the target margin; papers and TRL's CPO trainer also state γ/β.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = _NO_REFERENCE
    reward_unit = "nats per token"

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.gamma = gamma

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        return losses.simpo(chosen - rejected, self.gamma)

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return self.beta * log_probs.chosen_mean, self.beta * log_probs.rejected_mean


class AlphaPO(PreferenceModule):
    """AlphaPO (Gupta et al. 2025): SimPO whose reward bends, (1 − p^{−α})/α with p = exp c̄.

    Rewards are β times that; α → 0 is SimPO. The defaults are the paper's for Mistral-Instruct
    [2nd: TRL's documentation].

    Args:
        beta: β, the scale of the rewards.
        gamma: γ, the target margin.
        alpha: α, how the reward bends.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = _NO_REFERENCE
    reward_unit = "per token"

    def __init__(
        self, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.gamma = gamma
        self.alpha = alpha

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        return losses.simpo(chosen - rejected, self.gamma)

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return (
            self.beta * losses.alpha_reward(log_probs.chosen_mean, self.alpha),
            self.beta * losses.alpha_reward(log_probs.rejected_mean, self.alpha),
        )


class CPO(PreferenceModule):
    """CPO (Xu et al. 2024): −log σ(β(c − r)) − λ·c̄.

    The likelihood term is the mean over pairs of each response's mean over tokens [ours; TRL
    averages over all tokens of the batch]. Rewards are β·c and β·r.

    Args:
        beta: β, the scale of the rewards.
        likelihood_weight: λ.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = _NO_REFERENCE

    def __init__(self, beta: float = 0.1, likelihood_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.likelihood_weight = in_range("likelihood_weight", likelihood_weight, 0, float("inf"))

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        return losses.dpo(chosen - rejected) - self.likelihood_weight * log_probs.chosen_mean

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return self.beta * log_probs.chosen, self.beta * log_probs.rejected


class ORPO(PreferenceModule):
    """ORPO (Hong et al. 2024): −c̄ + λ·[−log σ(log-odds(w) − log-odds(l))], odds of exp c̄.

    The likelihood term is over the response only, the mean over pairs of each response's mean over
    tokens [ours; TRL averages over all tokens of the batch, the prompts' too]. Rewards are λ times
    the log-odds.

    Args:
        odds_weight: λ, TRL's ``beta``.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = _NO_REFERENCE
    reward_unit = "nats per token"
    strength = "odds_weight"

    def __init__(self, odds_weight: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.odds_weight = positive("odds_weight", odds_weight)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        odds = losses.orpo(log_probs.chosen_mean, log_probs.rejected_mean)
        return self.odds_weight * odds - log_probs.chosen_mean

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return (
            self.odds_weight * losses.log_odds(log_probs.chosen_mean),
            self.odds_weight * losses.log_odds(log_probs.rejected_mean),
        )


class TPO(PreferenceModule):
    """TPO (Saeidi et al. 2024): triple preference optimisation, a pair and a gold response.

    ``sum``: −log σ(β(c − r)) − α·ḡ; ``mean`` (TPO-L): −log σ(β(c̄ − r̄) − γ) − α·ḡ, where ḡ is the
    gold response's log-prob per token. The gold response is a column of its own:
    ``data.extra_responses: {gold: COLUMN}``. The likelihood term is the mean over rows of each
    response's mean over tokens [ours; TRL averages over all tokens of the batch]. Rewards are β
    times the log-probs that are compared.

    Args:
        beta: β, the scale of the rewards.
        gold_weight: α, the weight of the gold response's likelihood.
        normalise: compare ``sum``s over tokens, or ``mean``s.
        gamma: γ, the target margin of ``mean``.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    needs = Needs(reference=False, roles=(Role.GOLD,))

    def __init__(
        self,
        beta: float = 0.01,
        gold_weight: float = 1.0,
        normalise: Literal["sum", "mean"] = "sum",
        gamma: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.gold_weight = in_range("gold_weight", gold_weight, 0, float("inf"))
        self.normalise = either("normalise", normalise, "sum", "mean")
        self.gamma = gamma

    @property
    def reward_unit(self) -> str:  # type: ignore[override]
        return "nats" if self.normalise == "sum" else "nats per token"

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(log_probs)
        gamma = self.gamma if self.normalise == "mean" else 0.0
        gold = given(log_probs.gold, "gold") / given(log_probs.gold_length, "gold_length")
        return losses.simpo(chosen - rejected, gamma) - self.gold_weight * gold

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        if self.normalise == "mean":
            return self.beta * log_probs.chosen_mean, self.beta * log_probs.rejected_mean
        return self.beta * log_probs.chosen, self.beta * log_probs.rejected
