"""DPO for labels that may be wrong: losses that bear flipped pairs."""

from typing import Any

from torch import Tensor

from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import losses
from rotopo.objectives.base import ReferenceObjective, in_range, positive


class RobustDPO(ReferenceObjective):
    """rDPO (Chowdhury et al. 2024): DPO's loss made unbiased under labels flipped at a known rate.

    [−(1−ε) log σ(z) + ε log σ(−z)] / (1−2ε), which falls without bound as z grows. Not the robust
    loss :class:`ROPO`, and not R-DPO, which is :class:`LengthRegularizedDPO`.

    Args:
        beta: β, how strongly the policy is held to the reference.
        flip_rate: ε, the rate of flipped labels, below ½.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.1, flip_rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.flip_rate = in_range("flip_rate", flip_rate, 0, 0.5)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.robust_dpo(self.margin(log_probs), self.flip_rate)


class DrDPO(ReferenceObjective):
    """Dr. DPO (Wu et al. 2024): DPO's losses under a soft minimum, so that outliers weigh less.

    Couples the pairs of a micro-batch on one rank: accumulation and ranks change what is compared.
    Every pair's loss is logged as its micro-batch's.

    Args:
        beta: β, how strongly the policy is held to the reference.
        temperature: β′ of the soft minimum; the larger, the nearer to DPO.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    couples_pairs = True

    def __init__(self, beta: float = 0.1, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.temperature = positive("temperature", temperature)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.dr_dpo(losses.dpo(self.margin(log_probs)), self.temperature)


class HolderDPO(ReferenceObjective):
    """Hölder-DPO (Fujisawa et al. 2025): −(1+γ)p^γ + γ p^{γ+1}, p = σ(z); it forgets outliers.

    Args:
        beta: β, how strongly the policy is held to the reference.
        gamma: γ > 0; the larger, the less a pair counts that the policy ranks the other way.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.1, gamma: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        self.gamma = positive("gamma", gamma)

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.holder_dpo(self.margin(log_probs), self.gamma)


class ROPO(ReferenceObjective):
    """ROPO (arXiv 2404.04102): robust preference optimisation, a loss that bears flipped labels.

    4α/(1+α)²·[−log σ(z)] + 4α²/(1+α)²·σ(−z) [2nd: three sources that read the paper agree]. Not
    RoPO, which is :class:`DPO` through a rotation, nor rDPO (:class:`RobustDPO`), nor R-DPO
    (:class:`LengthRegularizedDPO`).

    Args:
        beta: β, how strongly the policy is held to the reference [ours: the paper's was not found].
        alpha: α > 2; the larger, the less a pair counts that the policy ranks the other way. The
            advice is higher for much noise and for summaries, lower for little noise and for
            dialogue [2nd].
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 14.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta)
        if not alpha > 2:
            raise InputError(
                f"alpha is {alpha}: it has to be above 2, or pairs ranked the wrong way would "
                "count more than undecided ones."
            )
        self.alpha = alpha

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        return losses.ropo(self.margin(log_probs), self.alpha)
