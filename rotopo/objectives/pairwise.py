"""Objectives on the margin between the chosen and the rejected response, against a reference."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs, given, sum_of_role
from rotopo.objectives import losses
from rotopo.objectives.base import ReferenceObjective, either, in_range, positive


class DPO(ReferenceObjective):
    """Direct preference optimisation (Rafailov et al. 2023): −log σ(β·h).

    Trained through :class:`rotopo.rotation.RotationConfig` this is **RoPO**, weights-rotated
    preference optimisation (arXiv 2508.17637), whose loss is DPO's unchanged. The robust loss
    :class:`ROPO` (arXiv 2404.04102) is another objective, and so are :class:`RobustDPO` (rDPO) and
    :class:`LengthRegularizedDPO` (R-DPO).

    The settings are variants of it from several papers, and can be combined: label smoothing
    (cDPO), f-divergences (f-DPO), length normalisation (TRL's ``sigmoid_norm``) and WPO's weights.
    Rewards are β·f′(u), per token with ``normalise_length``.

    Args:
        beta: β, how strongly the policy is held to the reference. WPO's official code has .01,
            as configs/objectives/wpo.yaml: this default is DPO's.
        label_smoothing: ε of cDPO, the assumed rate of flipped labels, below ½.
        divergence: the divergence from the reference that f-DPO puts in the KL's place.
        divergence_alpha: α of ``divergence: alpha`` as TRL has it: 1 − α of f-DPO's paper.
        normalise_length: divide each response's score by its tokens.
        wpo: weight each pair by the likelihood of its responses under the policy.
        wpo_clamp: a pair's weight, the product of its responses', is 1 at most, as in WPO's
            official code; without it as in TRL 1.16, where pairs of a confident policy weigh more.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        divergence: losses.Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
        normalise_length: bool = False,
        wpo: bool = False,
        wpo_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if divergence not in get_args(losses.Divergence):
            raise InputError(
                f"divergence is {divergence!r}: it has to be one of "
                f"{', '.join(get_args(losses.Divergence))}."
            )
        self.beta = positive("beta", beta)
        self.label_smoothing = in_range("label_smoothing", label_smoothing, 0, 0.5)
        self.divergence = divergence
        self.divergence_alpha = divergence_alpha
        self.normalise_length = normalise_length
        self.wpo = wpo
        self.wpo_clamp = wpo_clamp
        self.needs = Needs(moments=wpo)

    @property
    def reward_unit(self) -> str:  # type: ignore[override]
        unit = "nats" if self.divergence == "reverse_kl" else ""  # else f′(u) is no logarithm
        return f"{unit} per token".strip() if self.normalise_length else unit

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        pair_losses = losses.dpo(self.margin(log_probs), self.label_smoothing)
        return pair_losses * self._wpo_weights(log_probs) if self.wpo else pair_losses

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        scores = [
            self.beta * losses.divergence_score(ratio, self.divergence, self.divergence_alpha)
            for ratio in (log_probs.chosen_log_ratio, log_probs.rejected_log_ratio)
        ]
        if self.normalise_length:
            lengths = log_probs.chosen_length, log_probs.rejected_length
            scores = [score / length for score, length in zip(scores, lengths, strict=True)]
        return scores[0], scores[1]

    def _wpo_weights(self, log_probs: PairLogProbs) -> Tensor:
        """The product of both responses' weights [B], without gradient."""
        tokens = given(log_probs.tokens, "tokens")
        squared = given(tokens.sum_squared, "sum_squared")
        values = losses.wpo_log_weight(tokens.log_prob, squared)
        log_weight = torch.zeros_like(log_probs.chosen)
        for role, length in (
            (Role.CHOSEN, log_probs.chosen_length),
            (Role.REJECTED, log_probs.rejected_length),
        ):
            total = sum_of_role(values, role, tokens.role, tokens.pair, len(log_weight))
            log_weight += total / length
        return (log_weight.clamp(max=0) if self.wpo_clamp else log_weight).exp()


class IPO(ReferenceObjective):
    """IPO (Azar et al. 2023): (h − 1/(2β))², which stops pulling at a margin of h = 1/(2β).

    Args:
        beta: β, the paper's τ.
        normalise: h from ``sum``s over tokens, as the paper's formula and OpenRLHF have it, or
            from ``mean``s, as TRL has it, whose authors had it confirmed by the paper's.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self, beta: float = 0.1, normalise: Literal["sum", "mean"] = "mean", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.normalise = either("normalise", normalise, "sum", "mean")

    @property
    def reward_unit(self) -> str:  # type: ignore[override]
        return "nats" if self.normalise == "sum" else "nats per token"

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.ipo(self.margin(log_probs) / self.beta, self.beta)

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().rewards(log_probs)
        if self.normalise == "sum":
            return chosen, rejected
        return chosen / log_probs.chosen_length, rejected / log_probs.rejected_length


class SLiC(ReferenceObjective):
    """SLiC's hinge (Zhao et al. 2023, SLiC-HF): max(0, δ − c + r), or of the margin z, plus −λ·c̄.

    With the reference it is TRL's ``hinge``, max(0, δ − z). The likelihood term is on the chosen
    response, per token [ours; SLiC-HF's is on a supervised target]. Rewards are β·Δ, without the
    reference the log-probs themselves.

    Args:
        beta: β; only with the reference.
        delta: δ, the margin beyond which a pair has no gradient.
        reference: compare log-ratios to the reference rather than log-probs.
        likelihood_weight: λ, the weight of the chosen response's likelihood.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        delta: float = 1.0,
        reference: bool = True,
        likelihood_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.delta = positive("delta", delta)
        self.likelihood_weight = in_range("likelihood_weight", likelihood_weight, 0, math.inf)
        self.needs = Needs(reference=reference)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        hinge = losses.hinge(self.margin(log_probs), self.delta)
        return hinge - self.likelihood_weight * log_probs.chosen_mean

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        if self.needs.reference:
            return super().rewards(log_probs)
        return log_probs.chosen, log_probs.rejected


class DPOP(ReferenceObjective):
    """DPO-Positive (Pal et al. 2024, Smaug): DPO that punishes a falling chosen response.

    Args:
        beta: β, how strongly the policy is held to the reference.
        penalty: λ, on each nat that the chosen lies below the reference.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.3, penalty: float = 50.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.penalty = in_range("penalty", penalty, 0, math.inf)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.dpop(
            log_probs.chosen_log_ratio, log_probs.rejected_log_ratio, self.beta, self.penalty
        )


class EXO(ReferenceObjective):
    """EXO (Ji et al. 2024): the reverse KL, from the policy's preference to smoothed labels.

    The official code's ``exo-pref`` has no label smoothing: it fixes log ε at −10 and log(1 − ε) at
    0, which ``label_smoothing: 4.54e-5`` is to 5e-5 nats. Its β is .5 on HH and TL;DR and .1 on
    IMDb.

    Args:
        beta: β, how strongly the policy is held to the reference.
        label_smoothing: ε > 0, how far from certain the labels are taken [TRL's default].
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.label_smoothing = in_range(
            "label_smoothing", positive("label_smoothing", label_smoothing), 0, 0.5
        )

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.exo(self.margin(log_probs), self.label_smoothing)


class DiscoPOP(ReferenceObjective):
    """DiscoPOP (Lu et al. 2024): a mix of the logistic and the exponential loss, found by search.

    Args:
        beta: β, how strongly the policy is held to the reference.
        tau: τ, the temperature of the mix.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.05, tau: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.tau = positive("tau", tau)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.discopop(self.margin(log_probs), self.tau)


class AOT(ReferenceObjective):
    """AOT (Melnyk et al. 2024): alignment by optimal transport, DPO between sorted samples.

    Couples the pairs of a micro-batch on one rank: accumulation and ranks change what is sorted.

    Args:
        beta: β, how strongly the policy is held to the reference.
        paired: sort c − r of the policy against the reference's; else Δw against Δl.
        label_smoothing: ε, as in :class:`DPO`.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    couples_pairs = True

    def __init__(
        self, beta: float = 0.01, paired: bool = True, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.paired = paired
        self.label_smoothing = in_range("label_smoothing", label_smoothing, 0, 0.5)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        if self.paired:
            reference_chosen = given(log_probs.reference_chosen, "reference_chosen")
            reference_rejected = given(log_probs.reference_rejected, "reference_rejected")
            samples = (
                log_probs.chosen - log_probs.rejected,
                reference_chosen - reference_rejected,
            )
        else:
            samples = log_probs.chosen_log_ratio, log_probs.rejected_log_ratio
        return losses.aot(*samples, self.beta, self.label_smoothing)
