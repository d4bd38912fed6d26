"""Every objective: its formula, its gradient, where it starts, and that nothing overflows."""

import itertools
import math

import pytest
import torch
from mpmath import mpf
from torch import Tensor

from rotopo import objectives
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives.base import PreferenceModule, ReferenceObjective
from tests.objectives.cases import (
    BOUNDED,
    CASES,
    OBJECTIVES,
    log_probs,
    losses_of,
    rewards_of,
    rows_of,
    some,
)

LN2 = math.log(2)
every = pytest.mark.parametrize("name", OBJECTIVES)
every_formula = pytest.mark.parametrize("name", CASES)


def test_every_objective_is_a_case():
    assert {type(objective).__name__ for objective in OBJECTIVES.values()} == set(
        objectives.__all__
    )


def assert_equal(found: Tensor, expected: list[mpf], relative: float = 1e-12) -> None:
    wanted = torch.tensor([float(value) for value in expected], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), wanted, rtol=relative, atol=relative)


@every_formula
def test_the_losses_are_the_formulas(name):
    objective, formula = CASES[name]
    for seed in range(3):
        values = some(seed=seed)
        assert_equal(losses_of(objective, values), formula(rows_of(values)))


@every
def test_gradients_are_finite_differences(name):
    objective = OBJECTIVES[name]
    start = some()
    fixed = {
        "w": start.chosen_length.tolist(),
        "l": start.rejected_length.tolist(),
        "gold_length": start.gold_length,
        "mismatched_log_ratio": start.mismatched_log_ratio,
    }

    def losses(c, r, c0, r0, gold, kl):
        made = log_probs(c, r, c0, r0, **fixed, gold=gold, reference_kl=kl)
        found = losses_of(objective, made)
        if not name.startswith("DPO-wpo"):
            return found
        # The weights have no gradient: finite differences must see them fixed.
        weights = losses_of(objective, start) / losses_of(CASES["DPO"][0], start)
        return found / (found / losses_of(CASES["DPO"][0], made)).detach() * weights.detach()

    leaves = (start.chosen, start.rejected, start.reference_chosen, start.reference_rejected)
    assert torch.autograd.gradcheck(losses, (*leaves, start.gold, start.reference_kl))


def at_the_reference() -> PairLogProbs:
    """Δ = 0, and c = r with equal lengths for objectives without a reference."""
    c = torch.tensor([-6.0, -3.0, -9.0], dtype=torch.float64)
    w = [2, 3, 1]
    zero = torch.zeros_like(c)
    return log_probs(c, c, c, c, w, w, gold=c, gold_length=torch.tensor(w), reference_kl=zero,
                     mismatched_log_ratio=zero)  # fmt: skip


# With ε = .2, β = .3, and the other settings of the cases.
STARTS = {
    "RobustDPO": LN2,
    "IPO": 1 / (4 * 0.3**2),
    "IPO-sum": 1 / (4 * 0.3**2),
    "SLiC": 1.5,
    "EXO": 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01),
    "DiscoPOP": 0.5 * LN2 + 0.5,
    "HolderDPO": -2.5 * 0.5**1.5 + 1.5 * 0.5**2.5,
    "ROPO": 56 / 225 * LN2 + 784 / 225 / 2,
    "KTO": (1.2 + 0.7) / 4,
    "BCO": 2 * LN2,
    "NCA": 2 * LN2,
    "SPPO": 2 / (4 * 0.3**2),
    "APO-zero": 1.0,
    "APO-down": 1.0,
    "SimPO": math.log1p(math.exp(0.8)),
    "AlphaPO": math.log1p(math.exp(0.8)),
    "TYPO": LN2,
}
LIKELIHOOD = {  # the constant, and the weight of −c̄ beside it
    "SFT": (0.0, 1.0),
    "CPO": (LN2, 0.7),
    "ORPO": (0.4 * LN2, 1.0),
    "TPO": (LN2, 0.7),
    "TPO-L": (math.log1p(math.exp(0.8)), 0.7),
    "SLiC-HF": (1.5, 0.7),
    "Mixture": (LN2, 0.25),
}


# WPO's begins weighted by its responses' likelihoods, see test_tokens.py.
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not name.startswith("DPO-wpo")])
def test_the_first_loss_is_its_constant(name):
    """ln 2 for all forms of DPO."""
    values = at_the_reference()
    objective = OBJECTIVES[name]
    constant, weight = LIKELIHOOD.get(name, (STARTS.get(name, LN2), 0.0))
    expected = constant - weight * values.chosen_mean
    torch.testing.assert_close(losses_of(objective, values), expected, rtol=1e-14, atol=1e-14)


@every
def test_rewards_start_at_zero_and_follow_the_log_probs(name):
    objective = OBJECTIVES[name]
    values = at_the_reference()
    chosen, rejected = rewards_of(objective, values)
    if objective.needs.reference and name not in ("LengthRegularizedDPO", "TYPO"):
        assert not chosen.any()
        assert not rejected.any()
    torch.testing.assert_close(chosen, rejected)

    values = some()
    chosen, rejected = rewards_of(objective, values)
    for reward, own, other in (
        (chosen, values.chosen, values.rejected),
        (rejected, values.rejected, values.chosen),
    ):
        to_own, to_other = torch.autograd.grad(
            reward.sum(), (own, other), retain_graph=True, allow_unused=True
        )
        assert (to_own > 0).all()
        assert to_other is None or not to_other.any()


@every
def test_the_unit_of_the_rewards_is_what_they_are_in(name):
    """Twice the nats in twice the tokens: rewards in nats double, and those per token stay."""
    objective = OBJECTIVES[name]
    parts = [-torch.rand(4, dtype=torch.float64, generator=torch.manual_seed(i)) for i in range(4)]
    beside = {"mismatched_log_ratio": torch.zeros(4, dtype=torch.float64)}
    once, twice = (
        torch.stack(
            rewards_of(
                objective, log_probs(*(n * p for p in parts), [2 * n] * 4, [2 * n] * 4, **beside)
            )
        )
        for n in (1, 2)
    )
    if objective.reward_unit == "nats per token":
        torch.testing.assert_close(twice, once)
    elif objective.reward_unit == "nats":
        torch.testing.assert_close(twice, 2 * once)
    else:  # in the form of no logarithm
        assert not torch.allclose(twice, 2 * once)


# Of these some pull back from a margin that is large, or hold likelihoods where they are.
TURNING = {"IPO", "IPO-sum", "SPPO", "NCA", "EXO", "AOT", "APO-down"} | {
    "DPO-smoothed", "RobustDPO", "DiscoPOP"
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - TURNING))
def test_the_loss_falls_with_the_chosen_and_rises_with_the_rejected(name):
    values = some(40)
    losses = losses_of(OBJECTIVES[name], values)
    to_chosen, to_rejected = torch.autograd.grad(
        losses.sum(), (values.chosen, values.rejected), allow_unused=True
    )
    assert (to_chosen <= 0).all()
    assert to_chosen.any()
    assert (to_rejected is None) == (name == "SFT")
    assert to_rejected is None or (to_rejected >= 0).all()


def extremes(dtype: torch.dtype, w: int, l: int) -> PairLogProbs:  # noqa: E741
    """All log-probs from 0 to −1e4, so all log-ratios from −1e4 to 1e4 in all combinations."""
    grid = itertools.product([0.0, -1.0, -100.0, -1e4], repeat=4)
    c, r, c0, r0 = torch.tensor(list(grid), dtype=dtype).unbind(1)
    B = len(c)
    return log_probs(
        c.clone().requires_grad_(),
        r.clone().requires_grad_(),
        c0,
        r0,
        [w] * B,
        [l] * B,
        gold=c.flip(0).clone().requires_grad_(),
        gold_length=torch.full((B,), w),
        reference_kl=(-r).clone().requires_grad_(),
        mismatched_log_ratio=torch.where(torch.arange(B) % 2 == 0, c - c0, 1.0).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("w", "l"), [(1, 1), (2, 5)])
@every
def test_loss_rewards_and_gradient_stay_finite(name, dtype, w, l):  # noqa: E741
    values = extremes(dtype, w, l)
    objective = OBJECTIVES[name]
    losses = losses_of(objective, values)
    losses.sum().backward()
    assert losses.isfinite().all()
    for leaf in (values.chosen, values.rejected, values.gold, values.reference_kl):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    for reward in rewards_of(objective, values):
        assert reward.isfinite().all()


@pytest.mark.parametrize("name", sorted(CASES.keys() - BOUNDED))
def test_far_from_the_reference_the_losses_are_still_the_formulas(name):
    objective, formula = CASES[name]
    for lengths in ((1, 1), (2, 5)):
        values = extremes(torch.float64, *lengths)
        assert_equal(losses_of(objective, values), formula(rows_of(values)))


@pytest.mark.parametrize("name", ["DPO-forward_kl", "DPO-alpha", "AlphaPO"])
def test_where_the_exponential_is_bounded_a_lost_pair_has_a_gradient_that_adam_survives(name):
    """A clamp would leave the worst pairs as they are; an infinite second moment would stop the
    weight for good."""
    low = torch.tensor([-1e4], requires_grad=True)
    zero = torch.zeros(1)
    optimizer = torch.optim.Adam([low], lr=1.0)
    for _ in range(2):
        losses_of(CASES[name][0], log_probs(low, zero, zero, zero)).sum().backward()
        assert low.grad.item() < -1e10
        optimizer.step()
        optimizer.zero_grad()
    assert low.item() == pytest.approx(-1e4 + 2, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orpo_is_finite_where_a_response_is_certain(dtype):
    zero = torch.zeros(3, dtype=dtype, requires_grad=True)
    low = torch.tensor([0.0, -1e-3, -1e4], dtype=dtype, requires_grad=True)
    for c, r in ((zero, low), (low, zero)):
        losses = losses_of(objectives.ORPO(), log_probs(c, r, c, r))
        gradients = torch.autograd.grad(losses.sum(), (zero, low))
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


@every
def test_without_a_reference_no_reference_is_looked_at(name):
    objective = OBJECTIVES[name]
    if objective.needs.reference:
        assert isinstance(objective, ReferenceObjective) or name in ("TYPO", "Mixture")
        return
    values = some()
    bare = PairLogProbs(values.chosen, values.rejected, values.chosen_length,
                        values.rejected_length, gold=values.gold,
                        gold_length=values.gold_length)  # fmt: skip
    assert torch.equal(losses_of(objective, bare), losses_of(objective, values))


@every
def test_a_pairs_loss_depends_on_its_row_alone_unless_it_says_otherwise(name):
    objective = OBJECTIVES[name]
    values = some()
    losses = losses_of(objective, values)
    to_chosen = torch.stack(
        [torch.autograd.grad(loss, values.chosen, retain_graph=True)[0] for loss in losses]
    )
    couples = name in ("DrDPO", "AOT", "AOT-unpaired")
    assert (to_chosen.count_nonzero() > len(losses)) == (name == "DrDPO")
    if not couples:
        assert not (to_chosen - to_chosen.diag().diag()).any()


@every
def test_the_strength_is_a_setting(name):
    objective = OBJECTIVES[name]
    if name not in ("SFT", "Mixture"):
        assert getattr(objective, objective.strength) > 0


def test_length_normalised_dpo_is_tulu_3s():
    """dpo_norm of allenai/open-instruct, open_instruct/dpo_utils.py: DPO on mean log-probs."""
    p = some()
    policy = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    reference = p.reference_chosen / p.chosen_length - p.reference_rejected / p.rejected_length
    expected = -torch.nn.functional.logsigmoid(5.0 * (policy - reference))
    found = losses_of(objectives.DPO(beta=5.0, normalise_length=True), p)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


BAD: list[tuple[type[PreferenceModule], dict, str]] = [
    *(
        (getattr(objectives, name), {"beta": 0.0}, "beta is 0.0")
        for name in objectives.__all__
        if name not in ("ORPO", "TYPO", "SFT", "Mixture")
    ),
    (objectives.DPO, {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
    (objectives.DPO, {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    (objectives.DPO, {"divergence": "hellinger"}, "reverse_kl, forward_kl, js, alpha"),
    (objectives.RobustDPO, {"flip_rate": 0.5}, "flip_rate is 0.5"),
    (objectives.IPO, {"normalise": "max"}, "'sum' or 'mean'"),
    (objectives.SLiC, {"delta": -1.0}, "delta is -1.0"),
    (objectives.DPOP, {"penalty": -1.0}, "penalty is -1.0"),
    (objectives.LengthRegularizedDPO, {"alpha": 0.0}, "alpha is 0.0"),
    (objectives.LDDPO, {"alpha": 1.1}, "alpha is 1.1"),
    (objectives.EXO, {"label_smoothing": 0.0}, "label_smoothing is 0.0"),
    (objectives.DiscoPOP, {"tau": 0.0}, "tau is 0.0"),
    (objectives.DrDPO, {"temperature": 0.0}, "temperature is 0.0"),
    (objectives.HolderDPO, {"gamma": 0.0}, "gamma is 0.0"),
    (objectives.ROPO, {"alpha": 2.0}, "alpha is 2.0"),
    (objectives.AOT, {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
    (objectives.KTO, {"desirable_weight": 0.0}, "desirable_weight is 0.0"),
    (objectives.KTO, {"undesirable_weight": -1.0}, "undesirable_weight is -1.0"),
    (objectives.APO, {"variant": "up"}, "'zero' or 'down'"),
    (objectives.CPO, {"likelihood_weight": -1.0}, "likelihood_weight is -1.0"),
    (objectives.ORPO, {"odds_weight": 0.0}, "odds_weight is 0.0"),
    (objectives.TPO, {"normalise": "max"}, "'sum' or 'mean'"),
    (objectives.TPO, {"gold_weight": -1.0}, "gold_weight is -1.0"),
    (objectives.TYPO, {"kl_weight": 0.0}, "kl_weight is 0.0"),
    (objectives.TYPO, {"sample_tokens": 0}, "sample_tokens is 0"),
    (objectives.Mixture, {"objectives": []}, "objectives"),
    (objectives.Mixture, {"objectives": [objectives.SFT()], "weights": [1.0, 2.0]}, "2 weights"),
]


@pytest.mark.parametrize(("objective", "settings", "message"), BAD)
def test_a_setting_out_of_its_range_is_named(objective, settings, message):
    with pytest.raises(InputError, match=message):
        objective(**settings)
