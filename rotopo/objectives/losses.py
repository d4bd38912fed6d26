"""Preference losses: pure functions of log-probs, one value per pair.

No module, no configuration and no state, so that training, studies and tests use the same code.
All tensors are [B], in nats. Notation: Δw = log π_θ(y_w|x) − log π_ref(y_w|x) for the chosen
response and Δl for the rejected one, h = Δw − Δl, z = β·h the margin of the implicit rewards; c and
r the log-probs themselves, c̄ and r̄ the same per token.

Every loss and its gradient stay finite in float32 and bfloat16 for log-ratios up to ±1e4, and
autograd differentiates all of them.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# Where exp() goes on as its tangent [ours]: so far from overflow that the square of a gradient,
# which Adam keeps, is finite in float32 too.
_LARGEST_EXPONENT = 30.0


def dpo(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO, Rafailov et al. 2023, eq. 7: −log σ(z); with smoothing ε cDPO (Mitchell 2023):
    −(1−ε) log σ(z) − ε log σ(−z). cDPO is tolerant of flipped labels only at ε = ½ (arXiv
    2404.04102), where its minimum is z = 0.

    Args:
        margin: z.
        label_smoothing: ε, the assumed rate of flipped labels.
    """
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    return loss


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f′(u) of f-DPO, Wang et al. 2023, up to a constant, at u = π_θ/π_ref = exp Δ.

    reverse_kl: Δ. forward_kl: 1 − 1/u. js: log(2u/(1+u)). alpha: (u^{α−1} − 1)/(α−1), as TRL
    writes it, which is the paper's (1 − u^{−α})/α at 1 − α in the place of α; Δ in the limit
    α → 1, the paper's 0. Where u to the power is over e^30, its tangent in Δ stands for it [ours;
    TRL caps the α-divergence at e^80, without a gradient].

    Args:
        log_ratio: Δ.
        divergence: which f.
        alpha: α of the α-divergence, 1 − α of the paper's.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return log_ratio
    if divergence == "forward_kl":
        return 1 - _exp(-log_ratio)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    return (_exp((alpha - 1) * log_ratio) - 1) / (alpha - 1)


def robust_dpo(margin: Tensor, flip_rate: float) -> Tensor:
    """rDPO, Chowdhury et al. 2024: [−(1−ε) log σ(z) + ε log σ(−z)] / (1−2ε).

    Its mean over labels flipped at the rate ε is DPO's loss on the clean ones.

    Args:
        margin: z.
        flip_rate: ε < ½.
    """
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - flip_rate) * clean - flip_rate * flipped) / (1 - 2 * flip_rate)


def ipo(difference: Tensor, beta: float) -> Tensor:
    """IPO, Azar et al. 2023, eq. 17: (h − 1/(2β))².

    Args:
        difference: h, from sums or from means over tokens.
        beta: β, the paper's τ.
    """
    return (difference - 1 / (2 * beta)).square()


def hinge(margin: Tensor, delta: float = 1.0) -> Tensor:
    """SLiC's hinge, Zhao et al. 2023: max(0, δ − margin)."""
    return F.relu(delta - margin)


def simpo(margin: Tensor, gamma: float) -> Tensor:
    """SimPO, Meng et al. 2024: −log σ(β(c̄ − r̄) − γ).

    Args:
        margin: β(c̄ − r̄).
        gamma: γ, the target margin.
    """
    return -F.logsigmoid(margin - gamma)


def alpha_reward(mean_log_prob: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward, Gupta et al. 2025: (1 − p^{−α})/α with p = exp c̄; c̄ itself at α = 0.

    Where p^{−α} is over e^30, its tangent in c̄ stands for it [ours].
    """
    if alpha == 0:
        return mean_log_prob
    return (1 - _exp(-alpha * mean_log_prob)) / alpha


def log_odds(mean_log_prob: Tensor) -> Tensor:
    """log(p/(1−p)) with p = exp c̄, for c̄ ≤ 0; finite also where p rounds to 1."""
    x = mean_log_prob.clamp(max=-torch.finfo(mean_log_prob.dtype).eps)
    # Two ways to log(1 − eˣ), each exact on its side; the other side's input is made harmless,
    # since the gradient of a branch that is not taken must be finite too.
    near = x > -math.log(2)
    inside = torch.where(near, x, -1.0)
    outside = torch.where(near, -1.0, x)
    log1mexp = torch.where(near, (-torch.expm1(inside)).log(), torch.log1p(-outside.exp()))
    return x - log1mexp


def orpo(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """The odds-ratio term of ORPO, Hong et al. 2024: −log σ(log-odds(w) − log-odds(l)).

    Args:
        chosen_mean: c̄.
        rejected_mean: r̄.
    """
    return -F.logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def dpop(
    chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, beta: float, penalty: float
) -> Tensor:
    """DPO-Positive, Pal et al. 2024 (Smaug): −log σ(β(h − λ·max(0, −Δw))).

    Args:
        chosen_log_ratio: Δw.
        rejected_log_ratio: Δl.
        beta: β.
        penalty: λ, on a chosen response that has become less likely.
    """
    fallen = F.relu(-chosen_log_ratio)
    return -F.logsigmoid(beta * (chosen_log_ratio - rejected_log_ratio - penalty * fallen))


def length_regularized_dpo(margin: Tensor, extra_length: Tensor, alpha: float) -> Tensor:
    """R-DPO, Park et al. 2024: −log σ(z + α(|w| − |l|)).

    Args:
        margin: z.
        extra_length: |w| − |l| in tokens.
        alpha: α, nats of reward that a token costs.
    """
    # An integer times a number is float32 for torch, also beside a float64 margin.
    return -F.logsigmoid(margin + alpha * extra_length.to(margin))


def exo(margin: Tensor, label_smoothing: float) -> Tensor:
    """EXO, Ji et al. 2024, eq. 16: KL(q ‖ p) with q = (σ(z), σ(−z)) and p = (1−ε, ε).

    Args:
        margin: z.
        label_smoothing: ε > 0.
    """
    q, log_q = margin.sigmoid(), F.logsigmoid(margin)
    other, log_other = (-margin).sigmoid(), F.logsigmoid(-margin)
    return q * (log_q - math.log1p(-label_smoothing)) + other * (
        log_other - math.log(label_smoothing)
    )


def discopop(margin: Tensor, tau: float) -> Tensor:
    """DiscoPOP, Lu et al. 2024, eq. 5: (1 − m)·[−log σ(z)] + m·exp(−z), m = σ(z/τ).

    Args:
        margin: z.
        tau: τ.
    """
    # exp(−z) overflows where m vanishes, so their product is one exponential.
    exponential = _exp(F.logsigmoid(margin / tau) - margin)
    return (-margin / tau).sigmoid() * -F.logsigmoid(margin) + exponential


def dr_dpo(pair_losses: Tensor, temperature: float) -> Tensor:
    """Dr. DPO, Wu et al. 2024: −β′ log mean exp(−ℓ/β′), over the pairs given.

    Args:
        pair_losses: ℓ, DPO's loss of each pair.
        temperature: β′; the larger, the nearer to the plain mean.

    Returns:
        The batch's loss, once for every pair [B].
    """
    log_mean = torch.logsumexp(-pair_losses / temperature, 0) - math.log(len(pair_losses))
    return (-temperature * log_mean).expand(len(pair_losses))


def holder_dpo(margin: Tensor, gamma: float) -> Tensor:
    """Hölder-DPO, Fujisawa et al. 2025: −(1+γ)p^γ + γ p^{γ+1}, p = σ(z).

    Args:
        margin: z.
        gamma: γ > 0.
    """
    log_p = F.logsigmoid(margin)
    return gamma * ((gamma + 1) * log_p).exp() - (1 + gamma) * (gamma * log_p).exp()


def ropo(margin: Tensor, alpha: float) -> Tensor:
    """ROPO's robust loss, arXiv 2404.04102: 4α/(1+α)²·[−log σ(z)] + 4α²/(1+α)²·σ(−z) [2nd].

    The gradient's weight w(z) = 4α/(1+α)²·σ(−z)[1 + α σ(z)] is 1 at most, at
    z* = log((α−1)/(α+1)), and falls to 4α/(1+α)² for pairs that the policy ranks far the other way.

    Args:
        margin: z.
        alpha: α > 2.
    """
    scale = 4 * alpha / (1 + alpha) ** 2
    return scale * (-F.logsigmoid(margin) + alpha * (-margin).sigmoid())


def aot(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, Melnyk et al. 2024: DPO between the quantiles of two samples.

    Unpaired: of Δw and of Δl. Paired: of c − r and of the reference's.

    Args:
        chosen: the sample that should dominate.
        rejected: the other one.
        beta: β.
        label_smoothing: ε, as in :func:`dpo`.

    Returns:
        One value per quantile [B]: not in the order of the pairs.
    """
    return dpo(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def kto(advantage: Tensor) -> Tensor:
    """KTO, Ethayarajh et al. 2024, eq. 7, without its weight: 1 − σ(advantage).

    Args:
        advantage: βΔ − z0 of a desirable response, z0 − βΔ of an undesirable one.
    """
    return (-advantage).sigmoid()


def apo_zero(chosen_reward: Tensor, rejected_reward: Tensor) -> tuple[Tensor, Tensor]:
    """APO-zero, D'Oosterlinck et al. 2024, eq. 7: 1 − σ(βΔw), and σ(βΔl)."""
    return (-chosen_reward).sigmoid(), rejected_reward.sigmoid()


def apo_down(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024, eq. 8: σ(βΔw) + 1 − σ(z)."""
    return chosen_reward.sigmoid() + (rejected_reward - chosen_reward).sigmoid()


def nca(chosen_reward: Tensor, rejected_reward: Tensor) -> tuple[Tensor, Tensor]:
    """NCA, Chen et al. 2024: −log σ(βΔw) − ½log σ(−βΔw), and −½log σ(−βΔl)."""
    chosen = -F.logsigmoid(chosen_reward) - 0.5 * F.logsigmoid(-chosen_reward)
    return chosen, -0.5 * F.logsigmoid(-rejected_reward)


def bco(chosen_reward: Tensor, rejected_reward: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """BCO, Jung et al. 2024: −log σ(βΔw − δ), and −log σ(−(βΔl − δ)).

    Args:
        chosen_reward: βΔw.
        rejected_reward: βΔl.
        shift: δ.
    """
    return -F.logsigmoid(chosen_reward - shift), -F.logsigmoid(shift - rejected_reward)


def sppo(log_ratio: Tensor, target: float) -> Tensor:
    """SPPO with hard labels, Wu et al. 2024, eq. 4.7: (Δ − target)²; the official code halves it.

    Args:
        log_ratio: Δ.
        target: 1/(2β) for the chosen, −1/(2β) for the rejected.
    """
    return (log_ratio - target).square()


def typo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The supervised term of TYPO, arXiv 2407.09072: log(1 + π_θ(y_l|x)/π_θ(y_w|x)).

    The form is the composite loss of the official code of the follow-up (EXPO, arXiv 2506.07492).
    There is a regression form too, whose formula we could not read.

    Args:
        chosen: c.
        rejected: r.
    """
    return F.softplus(rejected - chosen)


def wpo_log_weight(log_probs: Tensor, sum_squared: Tensor) -> Tensor:
    """WPO, Zhou et al. 2024, eq. 2, per token: log p(y_t) − log Σ_v p_v², without gradient.

    A response's weight is the exponential of the mean over its tokens: how likely it is among
    responses that the policy itself would give. A pair's is the product of both, which the official
    code clamps at 1.
    """
    return (log_probs - sum_squared.log()).detach()


def _exp(x: Tensor) -> Tensor:
    """exp, going on as its tangent from a point near overflow, where the gradient stays alive."""
    bounded = x.clamp(max=_LARGEST_EXPONENT)
    beyond = F.relu(x - _LARGEST_EXPONENT)
    return bounded.exp() + math.exp(_LARGEST_EXPONENT) * beyond
