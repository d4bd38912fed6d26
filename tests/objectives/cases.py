"""Every objective beside its formula, evaluated in 60 digits as the papers print it.

The formulas share nothing with the implementation: they are of one row, of numbers, and without
any care for overflow.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from mpmath import exp, expm1, log, mp, mpf, power
from torch import Tensor

from rotopo.data.batch import Role
from rotopo.models.log_probs import PairLogProbs, ResponseTokens, handed
from rotopo.objectives import (
    AOT,
    APO,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    KTO,
    LDDPO,
    NCA,
    ORPO,
    ROPO,
    SFT,
    SPPO,
    TPO,
    TYPO,
    AlphaPO,
    DiscoPOP,
    DrDPO,
    HolderDPO,
    LengthRegularizedDPO,
    Mixture,
    RobustDPO,
    SamPO,
    SimPO,
    SLiC,
)
from rotopo.objectives.base import PreferenceModule

mp.dps = 60


def shares(length: int) -> list[float]:
    """How a response's log-prob is spread over its tokens: 1 : 2 : 3 ..."""
    return [2 * (t + 1) / (length * (length + 1)) for t in range(length)]


def squared(row: int, role: Role, position: int) -> float:
    """A made-up Σp² of the distribution that a token comes from."""
    return 0.2 + 0.1 * ((row + 2 * role + 3 * position) % 7)


def log_probs(
    c: Tensor,
    r: Tensor,
    c0: Tensor,
    r0: Tensor,
    w: list[int] | None = None,
    l: list[int] | None = None,  # noqa: E741 (the formulas' letter)
    rows: list[int] | None = None,
    **others: Tensor,
) -> PairLogProbs:
    """Log-probs of B rows with all that an objective can ask for; lengths are 1 by default.

    Each row also has a mismatched response of one token, which no sum may contain.
    """
    B = len(c)
    w, l = w or [1] * B, l or [1] * B  # noqa: E741
    names: list[tuple[int, Role, int]] = []
    parts: list[float] = []
    sources: list[int] = []  # into chosen, rejected, chosen, ..., and the mismatched one's
    for i in range(B):
        for role, length in ((Role.CHOSEN, w[i]), (Role.REJECTED, l[i])):
            names += [(i, role, t) for t in range(length)]
            parts += shares(length)
            sources += [2 * i + role] * length
        names.append((i, Role.MISMATCHED, 0))
        parts.append(1.0)
        sources.append(2 * B)

    def spread(chosen: Tensor, rejected: Tensor, mismatched: float) -> Tensor:
        totals = torch.stack([chosen, rejected], 1).flatten()
        totals = torch.cat([totals, totals.new_tensor([mismatched])])
        return totals[sources] * totals.new_tensor(parts)

    pair, role, position = (torch.tensor(column) for column in zip(*names, strict=True))
    tokens = ResponseTokens(
        pair=pair,
        role=role,
        position=position,
        log_prob=spread(c, r, -5),
        reference=spread(c0, r0, -7),
        sum_squared=c.new_tensor([squared(*name) for name in names]),
    )
    return PairLogProbs(
        chosen=c,
        rejected=r,
        chosen_length=torch.tensor(w),
        rejected_length=torch.tensor(l),
        reference_chosen=c0,
        reference_rejected=r0,
        rows=torch.arange(B) if rows is None else torch.tensor(rows),
        tokens=tokens,
        **others,
    )


@dataclass(frozen=True)
class Row:
    """One row of :func:`log_probs` in 60 digits."""

    c: mpf
    r: mpf
    c0: mpf
    r0: mpf
    w: int = 1
    l: int = 1  # noqa: E741
    gold: mpf = field(default_factory=lambda: mpf(0))
    gold_length: int = 1
    kl: mpf = field(default_factory=lambda: mpf(0))
    mismatched: mpf = field(default_factory=lambda: mpf(0))
    index: int = 0

    @property
    def dw(self) -> mpf:
        return self.c - self.c0

    @property
    def dl(self) -> mpf:
        return self.r - self.r0

    @property
    def h(self) -> mpf:
        return self.dw - self.dl


def rows_of(log_probs: PairLogProbs) -> list[Row]:
    """What :func:`log_probs` was made from."""

    def column(values: Tensor | None) -> list[mpf]:
        if values is None:
            return [mpf(0)] * len(log_probs.chosen)
        return [mpf(value) for value in values.detach().double().tolist()]

    lengths = log_probs.gold_length
    return [
        Row(*numbers, index=i)
        for i, numbers in enumerate(
            zip(
                column(log_probs.chosen),
                column(log_probs.rejected),
                column(log_probs.reference_chosen),
                column(log_probs.reference_rejected),
                log_probs.chosen_length.tolist(),
                log_probs.rejected_length.tolist(),
                column(log_probs.gold),
                [1] * len(log_probs.chosen) if lengths is None else lengths.tolist(),
                column(log_probs.reference_kl),
                column(log_probs.mismatched_log_ratio),
                strict=True,
            )
        )
    ]


Formula = Callable[[list[Row]], list[mpf]]


def each(formula: Callable[[Row], Any]) -> Formula:
    return lambda rows: [mpf(formula(row)) for row in rows]


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + exp(-x))


def ls(x: mpf) -> mpf:
    """log σ(x)."""
    return -log(1 + exp(-x))


def relu(x: mpf) -> mpf:
    return max(mpf(0), x)


def log_odds(mean: mpf) -> mpf:
    return mean - log(-expm1(mean))


def lddpo(beta: float, alpha: float) -> Formula:
    def formula(row: Row) -> mpf:
        shorter = min(row.w, row.l)

        def ratio(policy: mpf, reference: mpf, length: int) -> mpf:
            return sum(
                (1 if t < shorter else alpha) * share * (policy - reference)
                for t, share in enumerate(shares(length))
            )

        return -ls(beta * (ratio(row.c, row.c0, row.w) - ratio(row.r, row.r0, row.l)))

    return each(formula)


def wpo_weight(row: Row) -> mpf:
    weight = mpf(1)
    for role, total, length in ((Role.CHOSEN, row.c, row.w), (Role.REJECTED, row.r, row.l)):
        logs = [
            total * share - log(mpf(squared(row.index, role, t)))
            for t, share in enumerate(shares(length))
        ]
        weight *= exp(sum(logs) / length)
    return weight


def dr_dpo(beta: float, temperature: float) -> Formula:
    def formula(rows: list[Row]) -> list[mpf]:
        mean = sum(exp(ls(beta * row.h) / temperature) for row in rows) / len(rows)
        return [-temperature * log(mean)] * len(rows)

    return formula


def aot(beta: float, epsilon: float, paired: bool) -> Formula:
    def formula(rows: list[Row]) -> list[mpf]:
        if paired:
            good = sorted(row.c - row.r for row in rows)
            bad = sorted(row.c0 - row.r0 for row in rows)
        else:
            good, bad = sorted(row.dw for row in rows), sorted(row.dl for row in rows)
        z = [beta * (a - b) for a, b in zip(good, bad, strict=True)]
        return [-(1 - epsilon) * ls(x) - epsilon * ls(-x) for x in z]

    return formula


def kto(beta: float, desirable: float, undesirable: float) -> Formula:
    def formula(rows: list[Row]) -> list[mpf]:
        z0 = relu(beta * sum(row.mismatched for row in rows) / len(rows))
        return [
            (
                desirable * (1 - sigmoid(beta * row.dw - z0))
                + undesirable * (1 - sigmoid(z0 - beta * row.dl))
            )
            / 2
            for row in rows
        ]

    return formula


def f_dpo(score: Callable[[mpf], mpf]) -> Formula:
    """Of f′ at u = π_θ/π_ref."""
    return each(lambda p: -ls(0.3 * (score(exp(p.dw)) - score(exp(p.dl)))))


def dpo(p: Row) -> mpf:
    return -ls(0.3 * p.h)


CASES: dict[str, tuple[PreferenceModule, Formula]] = {
    "DPO": (DPO(0.3), each(dpo)),
    "DPO-smoothed": (
        DPO(0.3, label_smoothing=0.2),
        each(lambda p: -0.8 * ls(0.3 * p.h) - 0.2 * ls(-0.3 * p.h)),
    ),
    "DPO-forward_kl": (DPO(0.3, divergence="forward_kl"), f_dpo(lambda u: 1 - 1 / u)),
    "DPO-js": (DPO(0.3, divergence="js"), f_dpo(lambda u: log(2 * u / (1 + u)))),
    "DPO-alpha": (
        DPO(0.3, divergence="alpha", divergence_alpha=0.25),
        f_dpo(lambda u: (power(u, -0.75) - 1) / -0.75),
    ),
    "DPO-alpha-above-1": (
        DPO(0.3, divergence="alpha", divergence_alpha=1.5),
        f_dpo(lambda u: (power(u, 0.5) - 1) / 0.5),
    ),
    "DPO-per-token": (
        DPO(0.3, normalise_length=True),
        each(lambda p: -ls(0.3 * (p.dw / p.w - p.dl / p.l))),
    ),
    "DPO-wpo": (DPO(0.3, wpo=True), each(lambda p: min(mpf(1), wpo_weight(p)) * dpo(p))),
    "DPO-wpo-unclamped": (
        DPO(0.3, wpo=True, wpo_clamp=False),
        each(lambda p: wpo_weight(p) * dpo(p)),
    ),
    "RobustDPO": (
        RobustDPO(0.3, flip_rate=0.2),
        each(lambda p: (-0.8 * ls(0.3 * p.h) + 0.2 * ls(-0.3 * p.h)) / (1 - 2 * mpf(0.2))),
    ),
    "IPO": (IPO(0.3), each(lambda p: (p.dw / p.w - p.dl / p.l - 1 / (2 * mpf(0.3))) ** 2)),
    "IPO-sum": (IPO(0.3, "sum"), each(lambda p: (p.h - 1 / (2 * mpf(0.3))) ** 2)),
    "SLiC": (SLiC(0.3, delta=1.5), each(lambda p: relu(1.5 - 0.3 * p.h))),
    "SLiC-HF": (
        SLiC(delta=1.5, reference=False, likelihood_weight=0.7),
        each(lambda p: relu(1.5 - p.c + p.r) - 0.7 * p.c / p.w),
    ),
    "DPOP": (
        DPOP(0.3, penalty=5.0),
        each(lambda p: -ls(0.3 * (p.h - 5 * relu(p.c0 - p.c)))),
    ),
    "LengthRegularizedDPO": (
        LengthRegularizedDPO(0.3, alpha=0.05),
        each(lambda p: -ls(0.3 * p.h + 0.05 * (p.w - p.l))),
    ),
    "LDDPO": (LDDPO(0.3, alpha=0.4), lddpo(0.3, 0.4)),
    "EXO": (
        EXO(0.3, label_smoothing=0.01),
        each(
            lambda p: (
                sigmoid(0.3 * p.h) * (ls(0.3 * p.h) - log(1 - mpf(0.01)))
                + sigmoid(-0.3 * p.h) * (ls(-0.3 * p.h) - log(mpf(0.01)))
            )
        ),
    ),
    "DiscoPOP": (
        DiscoPOP(0.3, tau=0.05),
        each(
            lambda p: (
                sigmoid(-0.3 * p.h / 0.05) * -ls(0.3 * p.h)
                + sigmoid(0.3 * p.h / 0.05) * exp(-0.3 * p.h)
            )
        ),
    ),
    "DrDPO": (DrDPO(0.3, temperature=0.8), dr_dpo(0.3, 0.8)),
    "HolderDPO": (
        HolderDPO(0.3, gamma=1.5),
        each(
            lambda p: -2.5 * power(sigmoid(0.3 * p.h), 1.5) + 1.5 * power(sigmoid(0.3 * p.h), 2.5)
        ),
    ),
    "ROPO": (
        ROPO(0.3, alpha=14),
        each(
            lambda p: (
                4 * mpf(14) / 15**2 * -ls(0.3 * p.h)
                + 4 * mpf(14) ** 2 / 15**2 * sigmoid(-0.3 * p.h)
            )
        ),
    ),
    "AOT": (AOT(0.3, label_smoothing=0.2), aot(0.3, 0.2, paired=True)),
    "AOT-unpaired": (AOT(0.3, paired=False), aot(0.3, 0.0, paired=False)),
    "KTO": (KTO(0.3, desirable_weight=1.2, undesirable_weight=0.7), kto(0.3, 1.2, 0.7)),
    "BCO": (BCO(0.3), each(lambda p: -ls(0.3 * p.dw) - ls(-0.3 * p.dl))),
    "NCA": (
        NCA(0.3),
        each(lambda p: -ls(0.3 * p.dw) - ls(-0.3 * p.dw) / 2 - ls(-0.3 * p.dl) / 2),
    ),
    "SPPO": (
        SPPO(0.3),
        each(lambda p: (p.dw - 1 / (2 * mpf(0.3))) ** 2 + (p.dl + 1 / (2 * mpf(0.3))) ** 2),
    ),
    "APO-zero": (APO(0.3), each(lambda p: 1 - sigmoid(0.3 * p.dw) + sigmoid(0.3 * p.dl))),
    "APO-down": (
        APO(0.3, "down"),
        each(lambda p: sigmoid(0.3 * p.dw) + 1 - sigmoid(0.3 * p.h)),
    ),
    "SFT": (SFT(), each(lambda p: -p.c / p.w)),
    "SimPO": (
        SimPO(2.0, gamma=0.8),
        each(lambda p: -ls(2 * (p.c / p.w - p.r / p.l) - 0.8)),
    ),
    "AlphaPO": (
        AlphaPO(2.0, gamma=0.8, alpha=0.25),
        each(lambda p: -ls(2 * 4 * (exp(-p.r / p.l / 4) - exp(-p.c / p.w / 4)) - 0.8)),
    ),
    "CPO": (
        CPO(0.3, likelihood_weight=0.7),
        each(lambda p: -ls(0.3 * (p.c - p.r)) - 0.7 * p.c / p.w),
    ),
    "ORPO": (
        ORPO(odds_weight=0.4),
        each(lambda p: -p.c / p.w - 0.4 * ls(log_odds(p.c / p.w) - log_odds(p.r / p.l))),
    ),
    "TPO": (
        TPO(0.3, gold_weight=0.7),
        each(lambda p: -ls(0.3 * (p.c - p.r)) - 0.7 * p.gold / p.gold_length),
    ),
    "TPO-L": (
        TPO(2.0, gold_weight=0.7, normalise="mean", gamma=0.8),
        each(lambda p: -ls(2 * (p.c / p.w - p.r / p.l) - 0.8) - 0.7 * p.gold / p.gold_length),
    ),
    "TYPO": (TYPO(kl_weight=0.4), each(lambda p: log(1 + exp(p.r - p.c)) + 0.4 * p.kl)),
    "Mixture": (
        Mixture([DPO(0.3), SFT()], weights=[1.0, 0.25]),
        each(lambda p: dpo(p) - 0.25 * p.c / p.w),
    ),
}
# Drawn tokens have no formula: SamPO has tests of its own, and joins where none is needed.
OBJECTIVES: dict[str, PreferenceModule] = {
    "SamPO": SamPO(0.3),
    **{name: objective for name, (objective, _) in CASES.items()},
}
# Their exponential goes on as its tangent from e^30, or p is kept from 1: other values there.
BOUNDED = {"DPO-forward_kl", "DPO-alpha", "DPO-alpha-above-1", "AlphaPO", "ORPO"}


def some(B: int = 6, seed: int = 0) -> PairLogProbs:
    """B rows in float64 of leaves with gradients; log-ratios are a few nats of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        numbers = torch.rand(B, generator=generator, dtype=torch.float64)
        return (low + (high - low) * numbers).requires_grad_()

    def lengths() -> list[int]:
        return torch.randint(1, 6, (B,), generator=generator).tolist()

    return log_probs(
        *(uniform(-12, -2) for _ in range(4)),
        lengths(),
        lengths(),
        gold=uniform(-9, -1),
        gold_length=torch.tensor(lengths()),
        reference_kl=uniform(0, 3),
        mismatched_log_ratio=uniform(-1, 4).detach(),
    )


def baseline(objective: KTO, log_probs: PairLogProbs) -> Tensor:
    """z0 of log-probs that come without it."""
    total, count = handed(objective.complete(log_probs), "mismatched_total")
    return (objective.beta * total / count).clamp(min=0)


def losses_of(objective: PreferenceModule, log_probs: PairLogProbs) -> Tensor:
    """As a step computes them: of log-probs with what the module hands its objective."""
    return objective.losses(objective.complete(log_probs))


def rewards_of(objective: PreferenceModule, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """As :func:`losses_of`."""
    return objective.rewards(objective.complete(log_probs))
