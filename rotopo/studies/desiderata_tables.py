"""The tables of the study of desiderata, see :mod:`rotopo.studies.desiderata`."""

import math
from itertools import product

import pandas as pd
from torch import Tensor

from rotopo.objectives import DPO
from rotopo.objectives.base import PreferenceModule
from rotopo.studies.minimise import minimise
from rotopo.studies.tabular import (
    Convention,
    Prompt,
    Solution,
    arms,
    at_strength,
    has_strength,
    lowest,
    population,
    sampled,
    solve,
    starting_points,
)

Objectives = dict[str, PreferenceModule]

LAMBDAS = tuple(10 ** (k / 10) for k in range(-20, 21))
LOG_LAMBDAS = tuple(k / 4 for k in range(-20, 21))
ALPHAS = tuple(k / 100 for k in (0, 1, 2, 5, 10, 20, 50, 100))
SAMPLED_LAMBDAS = (0.1, 1.0, 10.0)

# [ours] What stands for λ → 0 and λ → ∞, and how close is close enough.
LIMITS = (1e-3, 1e3)
REACHED = 0.01  # total variation
PRESERVED = 1e-3  # nats


def interpolation(
    objectives: Objectives,
    prompt: Prompt,
    lambdas: tuple[float, ...] = LAMBDAS,
    convention: Convention = "ordered_pairs",
) -> pd.DataFrame:
    """The minimiser over λ, one row for each objective and λ."""
    rows = population(prompt, convention)
    table = []
    jobs = list(product(objectives.items(), sorted(lambdas)))
    for (name, objective), strength in jobs:
        found = solve(at_strength(objective, strength), rows)
        table.append({"objective": name, "lambda": strength, **_columns(found)})
    return pd.DataFrame(table)


def preservation(
    objectives: Objectives,
    good: Prompt,
    bad: Prompt,
    log_lambdas: tuple[float, ...] = LOG_LAMBDAS,
    convention: Convention = "ordered_pairs",
) -> pd.DataFrame:
    """KL(π* ‖ π_θ) in nats over ln λ, on a prompt where π_ref = π* and on one where it is not.

    Under the convention ``official`` it is divided by the number of responses, as in the curves of
    EXPO's code, whose line for the reference on the bad prompt is at .0349. Each prompt has a
    policy of its own, so that nothing but the objective can spoil the good one.
    """
    table = []
    jobs = list(product(objectives.items(), sorted(log_lambdas)))
    both = {name: population(prompt, convention) for name, prompt in (("good", good), ("bad", bad))}
    for (name, objective), log_lambda in jobs:
        row = {"objective": name, "log_lambda": log_lambda}
        remarks = []
        for which, rows in both.items():
            found = solve(at_strength(objective, math.exp(log_lambda)), rows)
            row[f"kl_{which}"] = found.kl(rows.prompt.true) / arms(rows.prompt, convention)
            remarks += [f"{which}: {found.remark}"] if found.remark else []
        table.append({**row, "remark": "; ".join(remarks)})
    return pd.DataFrame(table)


def constraint(
    prompt: Prompt,
    alphas: tuple[float, ...] = ALPHAS,
    convention: Convention = "ordered_pairs",
    strength: float = 1.0,
) -> pd.DataFrame:
    """DPO and the RLHF loss that it stands for, both with an added α‖θ‖² on the logits θ.

    π = softmax(θ). DPO's loss is, as the convention says, half of the mean over labelled pairs or
    that mean; RLHF's is −E_π[r] + λ·KL(π ‖ π_ref) with Bradley and Terry's reward r = log π*.
    Without α both have the minimiser π_ref·(π*)^{1/λ}, up to its norm. Both the constraint and this
    loss are in EXPO's official code; half of the mean, of ``ordered_pairs``, is [ours].
    """
    rows = population(prompt, convention)
    dpo = at_strength(DPO(), strength)
    reward, reference = prompt.true.log(), prompt.reference.log()
    table = []
    for alpha in sorted(alphas):

        def rlhf(theta: Tensor, alpha: float = alpha) -> Tensor:
            policy = theta.log_softmax(0)
            gain = reward - strength * (policy - reference)
            return -(policy.exp() @ gain) + alpha * theta.square().sum()

        exact = lowest([minimise(rlhf, start) for start in starting_points(prompt)])
        for name, found in (("DPO", solve(dpo, rows, alpha)), ("RLHF", exact)):
            table.append({"loss_name": name, "alpha": alpha, **_columns(found)})
    return pd.DataFrame(table)


def criteria(
    objectives: Objectives,
    prompt: Prompt,
    good: Prompt,
    log_lambdas: tuple[float, ...] = LOG_LAMBDAS,
    convention: Convention = "ordered_pairs",
) -> pd.DataFrame:
    """The paper's criteria, and the distances on which the verdicts rest.

    - weak interpolation: λ → ∞ gives π_ref, and λ → 0 the point mass on the mode of π*;
    - strong interpolation: λ → ∞ gives π_ref, and λ → 0 gives π*;
    - preservation: where π_ref = π*, the minimiser is π* at every λ.

    [ours] λ = ``LIMITS`` stand for the limits, reached within a total variation of ``REACHED``;
    preserved is what stays within KL(π* ‖ π_θ) = ``PRESERVED`` nats over all ``log_lambdas``. Where
    several minimisers have the same loss the farthest counts.
    """
    table = []
    rows, kept = population(prompt, convention), population(good, convention)
    for name, objective in objectives.items():
        low, high = (solve(at_strength(objective, limit), rows) for limit in LIMITS)
        on_good = [solve(at_strength(objective, math.exp(x)), kept) for x in log_lambdas]
        to_reference = high.distance(prompt.reference)
        to_mode, to_true = low.distance(prompt.mode), low.distance(prompt.true)
        spoiled = max(found.kl(good.true) for found in on_good)
        remarks = [
            f"λ = {limit:g}: {found.remark}"
            for limit, found in zip(LIMITS, (low, high), strict=True)
            if found.remark
        ]
        if not has_strength(objective):
            remarks.append("no λ")
        table.append(
            {
                "objective": name,
                "weak": max(to_reference, to_mode) <= REACHED,
                "strong": max(to_reference, to_true) <= REACHED,
                "preservation": spoiled <= PRESERVED,
                "high_to_reference": to_reference,
                "low_to_mode": to_mode,
                "low_to_true": to_true,
                "worst_kl_good": spoiled,
                "remark": "; ".join(remarks),
            }
        )
    return pd.DataFrame(table)


def samples_of(
    objectives: Objectives,
    prompt: Prompt,
    lambdas: tuple[float, ...] = SAMPLED_LAMBDAS,
    samples: int = 1000,
    draws: int = 8,
    convention: Convention = "ordered_pairs",
) -> pd.DataFrame:
    """Minimisers on samples of labelled pairs, beside that of the population (``seed`` −1)."""
    table = []
    data = {-1: population(prompt, convention)}
    data |= {seed: sampled(prompt, samples, seed, convention) for seed in range(draws)}
    jobs = list(product(objectives.items(), sorted(lambdas), data.items()))
    for (name, objective), strength, (seed, rows) in jobs:
        found = solve(at_strength(objective, strength), rows)
        table.append({"objective": name, "lambda": strength, "seed": seed, **_columns(found)})
    return pd.DataFrame(table)


def spread(samples: pd.DataFrame) -> pd.DataFrame:
    """Of :func:`samples_of`: population, mean and standard deviation of each π_θ(y_i)."""
    policy = [name for name in samples if name.startswith("pi_")]
    long = samples.melt(["objective", "lambda", "seed"], policy, "response", "value")
    keys = ["objective", "lambda", "response"]
    exact = long[long.seed == -1].set_index(keys)["value"].rename("population")
    drawn = long[long.seed >= 0].groupby(keys, sort=False)["value"].agg(["mean", "std"])
    return drawn.join(exact).reset_index()


def _columns(found: Solution) -> dict[str, float | str]:
    policy = {f"pi_{i}": p for i, p in enumerate(found.policy.tolist(), start=1)}
    return {**policy, "loss": found.loss, "gradient": found.gradient, "remark": found.remark}
