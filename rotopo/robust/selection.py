"""Which pairs ROPO's procedure keeps, and which new ones it takes in: pure functions."""

import numpy as np

from rotopo.errors import InputError


def n_kept(n: int, rho: float) -> int:
    """N_ρ = round((1 − ρ)·N): of N pairs those that are kept, where the share ρ is dropped."""
    return round((1 - rho) * n)


def keep(losses: np.ndarray, n: int) -> np.ndarray:
    """The pairs of the n smallest losses; of equal ones the first.

    The exact minimiser of Σ w_i ℓ_i over w_i in [0, 1] with Σ w_i = n, the linear program that
    ROPO alternates training with: an optimum puts weight 1 on these and 0 on all others.

    Args:
        losses: ℓ_i of all pairs [N].
        n: N_ρ.

    Returns:
        w, as true and false [N].

    Raises:
        InputError: a loss is no finite number.
    """
    broken = int((~np.isfinite(losses)).sum())
    if broken:
        raise InputError(
            f"{broken} of {len(losses)} pairs have a loss that is no finite number: the model has "
            "diverged; train it at a lower learning rate."
        )
    kept = np.zeros(len(losses), dtype=bool)
    kept[np.argsort(losses, kind="stable")[:n]] = True
    return kept


def best_and_worst(
    rewards: np.ndarray, with_first: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each prompt's responses the two to compare: the highest implicit reward and the lowest.

    Args:
        rewards: r̂ of C different responses to each of P prompts, NaN where a prompt has fewer
            [P, C]; of equal ones the first counts.
        with_first: only pairs that the first response is in: it and the one whose reward is
            farthest from its own, in the order of their rewards.

    Returns:
        best and worst, indices into the responses [P], and which prompts have two whose rewards
        differ [P].
    """
    missing = np.isnan(rewards)
    best = np.where(missing, -np.inf, rewards).argmax(1)
    worst = np.where(missing, np.inf, rewards).argmin(1)
    if with_first:
        apart = np.abs(rewards - rewards[:, :1])
        other = np.where(missing, -1.0, apart).argmax(1)
        above = rewards[np.arange(len(rewards)), other] > rewards[:, 0]
        best, worst = np.where(above, other, 0), np.where(above, 0, other)
    prompts = np.arange(len(rewards))
    return best, worst, rewards[prompts, best] > rewards[prompts, worst]


def threshold(kept_losses: np.ndarray, quantile: float) -> float:
    """The largest loss with which a new pair is accepted: the kept pairs' quantile (linear)."""
    return float(np.quantile(kept_losses, quantile))
