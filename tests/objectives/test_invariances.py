"""What each objective leaves alone, where it stops, and what it becomes in its limits."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import (
    AOT,
    DPO,
    DPOP,
    EXO,
    IPO,
    ORPO,
    SFT,
    SPPO,
    AlphaPO,
    DiscoPOP,
    DrDPO,
    HolderDPO,
    LengthRegularizedDPO,
    RobustDPO,
    SimPO,
    SLiC,
    losses,
)
from tests.objectives.cases import OBJECTIVES, log_probs, losses_of, rewards_of, some


def values(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def of_margins(h: Tensor, **others) -> PairLogProbs:
    """Pairs with the margins h, the chosen a nat up each."""
    zero = torch.zeros_like(h)
    return log_probs(zero - 4, zero - 4 - h, zero - 5, zero - 5, **others)


def moved(start: PairLogProbs, c: float, r: float, c0: float, r0: float) -> PairLogProbs:
    return log_probs(
        start.chosen + c,
        start.rejected + r,
        start.reference_chosen + c0,
        start.reference_rejected + r0,
        start.chosen_length.tolist(),
        start.rejected_length.tolist(),
        gold=start.gold,
        gold_length=start.gold_length,
        reference_kl=start.reference_kl,
        mismatched_log_ratio=start.mismatched_log_ratio,
    )


MARGINS = {
    "DPO", "DPO-smoothed", "RobustDPO", "IPO-sum", "SLiC", "LengthRegularizedDPO", "EXO",
    "DiscoPOP", "DrDPO", "HolderDPO", "ROPO", "AOT",
}  # fmt: skip
LOG_RATIOS = MARGINS | {
    "DPO-forward_kl", "DPO-js", "DPO-alpha", "DPO-alpha-above-1", "DPO-per-token", "IPO", "DPOP",
    "KTO", "BCO", "NCA", "SPPO", "APO-zero", "APO-down", "SamPO", "LDDPO", "AOT-unpaired",
}  # fmt: skip


def same(name: str, a: PairLogProbs, b: PairLogProbs) -> bool:
    objective = OBJECTIVES[name]
    return torch.allclose(losses_of(objective, a), losses_of(objective, b), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_margin_losses_bear_both_log_ratios_moved_alike(name):
    """The freedom that lets both likelihoods fall while the loss does."""
    start = some()
    assert same(name, start, moved(start, -3, -3, 0, 0)) == (
        name in MARGINS | {"AOT-unpaired", "TPO", "TYPO"}
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_log_ratio_losses_bear_policy_and_reference_moved_alike(name):
    start = some()
    assert same(name, start, moved(start, -3, -2, -3, -2)) == (name in LOG_RATIOS)
    assert same(name, start, moved(start, -3, -3, -3, -3)) == (name in LOG_RATIOS | {"TPO", "TYPO"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_pairs_depend_on_one_another(name):
    start, objective = some(), OBJECTIVES[name]
    others = values([0, 0, 0, 1, -2, 3])
    other = replace(
        moved(start, others, -others, 0, 0),
        mismatched_log_ratio=start.mismatched_log_ratio + torch.linspace(0, 1, 6),
    )
    first, same_first = (losses_of(objective, log_probs)[:3] for log_probs in (start, other))
    assert torch.allclose(first, same_first, rtol=1e-11, atol=1e-12) != objective.couples_pairs


@pytest.mark.parametrize("name", ["SimPO", "AlphaPO", "ORPO", "SFT", "TPO-L"])
def test_per_token_losses_bear_responses_repeated(name):
    start = some()
    factors = torch.tensor([2, 1, 3, 1, 2, 5])
    others = torch.tensor([1, 4, 3, 2, 1, 1])
    longer = PairLogProbs(
        start.chosen * factors,
        start.rejected * others,
        start.chosen_length * factors,
        start.rejected_length * others,
        gold=start.gold,
        gold_length=start.gold_length,
    )
    assert same(name, start, longer)


def test_ipo_stops_at_a_margin_of_half_of_one_over_beta():
    for beta in (0.05, 0.1, 2.0):
        h = values([1 / (2 * beta), 1 / (2 * beta) + 1, 1 / (2 * beta) - 1]).requires_grad_()
        found = IPO(beta, "sum").losses(of_margins(h))
        (gradient,) = torch.autograd.grad(found.sum(), h)
        torch.testing.assert_close(found, values([0, 1, 1]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, values([0, 2, -2]), rtol=1e-12, atol=1e-12)


def test_ipos_two_conventions_agree_for_single_tokens_and_differ_by_the_length():
    h = values([0.4, -2.0, 7.0])
    single = of_margins(h)
    assert torch.equal(IPO(0.3, "sum").losses(single), IPO(0.3, "mean").losses(single))
    four = of_margins(h, w=[4] * 3, l=[4] * 3)
    quarter = of_margins(h / 4)
    torch.testing.assert_close(IPO(0.3, "mean").losses(four), IPO(0.3, "sum").losses(quarter))


def test_a_hinge_has_no_gradient_beyond_its_margin():
    h = values([1.0, 9.9, 10.1, 50.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(SLiC(0.1).losses(of_margins(h)).sum(), h)
    torch.testing.assert_close(gradient, values([-0.1, -0.1, 0, 0]))


def test_dpop_is_dpo_where_the_chosen_has_not_fallen():
    start = some(40)
    fallen = start.chosen_log_ratio < 0
    assert fallen.any()
    assert (~fallen).any()
    plain, punished = DPO(0.3).losses(start), DPOP(0.3).losses(start)
    torch.testing.assert_close(plain[~fallen], punished[~fallen], rtol=1e-12, atol=1e-14)
    assert (punished[fallen] > plain[fallen]).all()


def test_r_dpo_pulls_less_at_equal_margins_where_the_chosen_is_the_longer():
    h = torch.full((3,), 0.7, dtype=torch.float64, requires_grad=True)
    pairs = of_margins(h, w=[2, 5, 9], l=[9, 5, 2])
    (gradient,) = torch.autograd.grad(LengthRegularizedDPO(0.3, 0.05).losses(pairs).sum(), h)
    shorter, equal, longer = (-gradient).tolist()
    assert shorter > equal > longer > 0
    (plain,) = torch.autograd.grad(DPO(0.3).losses(of_margins(h)).sum(), h)
    assert equal == pytest.approx(-plain[0].item(), rel=1e-12)
    assert longer == pytest.approx(0.3 / (1 + math.exp(0.3 * 0.7 + 0.05 * 7)), rel=1e-12)


def test_r_dpos_reward_pays_for_length_what_the_loss_takes_off():
    """−log σ of the reward's margin is the loss: the reward is what it fits."""
    start = some()
    objective = LengthRegularizedDPO(0.3, 0.05)
    chosen, rejected = rewards_of(objective, start)
    torch.testing.assert_close(losses.dpo(chosen - rejected), losses_of(objective, start))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.4])
def test_rdpo_is_unbiased_under_flips(epsilon):
    h = torch.linspace(-40, 40, 81, dtype=torch.float64)
    rdpo = RobustDPO(0.3, epsilon)
    noisy = (1 - epsilon) * rdpo.losses(of_margins(h)) + epsilon * rdpo.losses(of_margins(-h))
    torch.testing.assert_close(noisy, DPO(0.3).losses(of_margins(h)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.4])
def test_cdpo_is_the_expected_loss_and_stops_where_the_policy_is_as_sure_as_the_labels(epsilon):
    h = torch.linspace(-40, 40, 81, dtype=torch.float64)
    smoothed = DPO(0.3, label_smoothing=epsilon)
    plain = DPO(0.3)
    expected = (1 - epsilon) * plain.losses(of_margins(h)) + epsilon * plain.losses(of_margins(-h))
    torch.testing.assert_close(smoothed.losses(of_margins(h)), expected, rtol=1e-12, atol=1e-12)
    fixed = values([math.log((1 - epsilon) / epsilon) / 0.3]).requires_grad_()
    (gradient,) = torch.autograd.grad(smoothed.losses(of_margins(fixed)).sum(), fixed)
    assert abs(gradient.item()) <= 1e-15


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_exo_is_zero_where_the_policy_is_as_sure_as_the_labels_and_positive_elsewhere(epsilon):
    fixed = math.log((1 - epsilon) / epsilon) / 0.3
    h = (fixed + torch.linspace(-30, 30, 61, dtype=torch.float64)).requires_grad_()
    found = EXO(0.3, epsilon).losses(of_margins(h))
    (gradient,) = torch.autograd.grad(found.sum(), h)
    assert abs(found[30].item()) <= 1e-15
    assert abs(gradient[30].item()) <= 1e-15
    assert (found[torch.arange(61) != 30] > 0).all()


def test_f_dpos_alpha_is_the_reverse_kl_at_1_and_the_forward_kl_at_0():
    start = some()
    for limit, divergence in ((1, "reverse_kl"), (0, "forward_kl")):
        exact = DPO(0.3, divergence=divergence).losses(start)
        distances = []
        for step in (1e-3, 1e-4):
            for alpha in (limit + step, limit - step):
                near = DPO(0.3, divergence="alpha", divergence_alpha=alpha).losses(start)
                distances.append((near - exact).abs().max().item())
        assert max(distances[2:]) <= 0.2 * min(distances[:2])
        at_limit = DPO(0.3, divergence="alpha", divergence_alpha=limit).losses(start)
        torch.testing.assert_close(at_limit, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_every_f_divergence_scores_the_reference_with_zero_and_a_slope_of_its_own(divergence):
    """f′(1) = 0 up to TRL's constant, and f″(1): ½ for Jensen–Shannon, 1 for the others."""
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = losses.divergence_score(zero, divergence, 0.25)
    (slope,) = torch.autograd.grad(score, zero)
    assert abs(score.item()) <= 1e-15
    assert slope.item() == pytest.approx(0.5 if divergence == "js" else 1)


def test_alphapo_is_simpo_at_0_and_near_it():
    start = some()
    exact = SimPO(2.0, 0.8).losses(start)
    assert torch.equal(AlphaPO(2.0, 0.8, alpha=0).losses(start), exact)
    distances = [
        (AlphaPO(2.0, 0.8, alpha=alpha).losses(start) - exact).abs().max().item()
        for alpha in (1e-4, -1e-4, 1e-6, -1e-6)
    ]
    assert max(distances[2:]) <= 0.02 * min(distances[:2])


def test_simpos_gamma_is_a_margin_in_reward():
    zero = torch.zeros(1, dtype=torch.float64)
    at_target = log_probs(zero - 1, zero - 1.4, zero, zero)
    assert SimPO(2.0, gamma=0.8).losses(at_target).item() == pytest.approx(math.log(2))


def test_orpos_odds_are_those_of_the_mean_probability():
    probability = values([0.1, 0.5, 0.9, 0.999])
    odds = losses.log_odds(probability.log())
    torch.testing.assert_close(odds.exp(), probability / (1 - probability))
    start = some()
    ratio = ORPO(0.4).losses(start) - SFT().losses(start)
    doubled = ORPO(0.8).losses(start) - SFT().losses(start)
    torch.testing.assert_close(doubled, 2 * ratio)


def test_log_odds_are_exact_on_both_sides_of_their_two_ways():
    x = values([-1e-10, -1e-3, -math.log(2) + 1e-9, -math.log(2) - 1e-9, -5, -700])
    expected = [a - math.log(-math.expm1(a)) for a in x.tolist()]
    torch.testing.assert_close(losses.log_odds(x), values(expected), rtol=1e-12, atol=1e-12)


def test_dr_dpo_is_between_the_least_loss_and_the_mean_and_tends_to_them():
    start = some()
    pairs = DPO(0.3).losses(start)
    for temperature in (0.1, 1.0, 10.0):
        found = DrDPO(0.3, temperature).losses(start)
        assert torch.equal(found, found[:1].expand(len(found)))
        assert pairs.min() < found[0] < pairs.mean()
    near = DrDPO(0.3, 1e7).losses(start)
    torch.testing.assert_close(near, pairs.mean().expand(len(pairs)), rtol=1e-6, atol=1e-6)
    least = DrDPO(0.3, 1e-4).losses(start)
    torch.testing.assert_close(least, pairs.min().expand(len(pairs)), rtol=1e-3, atol=1e-3)


def test_dr_dpo_weighs_pairs_by_a_softmax_of_their_negative_losses():
    h = values([-8.0, 0.0, 3.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(DrDPO(0.3, 0.5).losses(of_margins(h)).mean(), h)
    plain = DPO(0.3).losses(of_margins(h))
    (own,) = torch.autograd.grad(plain.sum(), h)
    torch.testing.assert_close(gradient, own * (-plain.detach() / 0.5).softmax(0))


def test_hoelder_dpos_pull_is_p_to_gamma_and_vanishes_for_outliers():
    """d/dz = −γ(1+γ)p^γ(1−p)²: as strong as the loss is sure, and redescending."""
    h = torch.linspace(-60, 60, 121, dtype=torch.float64, requires_grad=True)
    for gamma in (0.5, 2.0):
        found = HolderDPO(0.3, gamma).losses(of_margins(h))
        (gradient,) = torch.autograd.grad(found.sum(), h)
        p = (0.3 * h).sigmoid().detach()
        expected = -0.3 * gamma * (1 + gamma) * p**gamma * (1 - p).square()
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
        assert gradient.abs().argmax() not in (0, 120)
        assert found.min() >= -1 - 1e-12
        assert found.max() <= 0


def test_discopop_is_exponential_for_sure_pairs_and_logistic_for_lost_ones():
    h = values([4.0, -4.0])
    found = DiscoPOP(1.0, tau=0.05).losses(of_margins(h))
    torch.testing.assert_close(found, values([math.exp(-4), math.log1p(math.exp(4))]))


def test_aot_does_not_care_which_response_belongs_to_which_prompt():
    start = some()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = PairLogProbs(
        start.chosen[order],
        start.rejected,
        start.chosen_length,
        start.rejected_length,
        start.reference_chosen[order],
        start.reference_rejected,
    )
    unpaired, paired = AOT(0.3, paired=False), AOT(0.3)
    torch.testing.assert_close(unpaired.losses(shuffled), unpaired.losses(start))
    assert not torch.allclose(paired.losses(shuffled), paired.losses(start))


@pytest.mark.parametrize("paired", [True, False])
def test_aot_of_one_pair_is_dpo(paired):
    start = some(1)
    torch.testing.assert_close(AOT(0.3, paired).losses(start), DPO(0.3).losses(start))


def test_apo_zero_moves_each_response_by_itself_and_apo_down_lowers_both():
    start = some(40)
    for name, chosen_sign in (("APO-zero", -1), ("APO-down", 1)):
        found = losses_of(OBJECTIVES[name], start)
        to_chosen, to_rejected = torch.autograd.grad(
            found.sum(), (start.chosen, start.rejected), retain_graph=True
        )
        assert (to_rejected > 0).all()
        if name == "APO-zero":
            assert (to_chosen * chosen_sign > 0).all()
    # At the reference the pull on the chosen is ¼ − ¼; once z is large it goes down.
    ahead = of_margins(values([40.0])).chosen.requires_grad_()
    zero = torch.zeros_like(ahead)
    pairs = log_probs(ahead, zero - 45, zero - 5, zero - 5)
    (gradient,) = torch.autograd.grad(losses_of(OBJECTIVES["APO-down"], pairs).sum(), ahead)
    assert gradient.item() > 0


def test_nca_holds_the_chosen_up():
    """Its pull on the chosen does not depend on the rejected, and ends at σ(βΔw) = ⅔."""
    level = values([math.log(2) / 0.3]).requires_grad_()
    for rejected in (-30.0, 30.0):
        zero = torch.zeros_like(level)
        found = losses_of(OBJECTIVES["NCA"], log_probs(level, zero + rejected, zero, zero))
        (gradient,) = torch.autograd.grad(found.sum(), level)
        assert abs(gradient.item()) <= 1e-15


def test_typos_first_term_has_no_reference_and_its_slope_is_the_losing_probability():
    c, r = values([-3.0]).requires_grad_(), values([-2.0])
    zero = torch.zeros_like(r)
    pairs = log_probs(c, r, zero, zero, reference_kl=zero + 0.7)
    found = losses_of(OBJECTIVES["TYPO"], pairs)
    (gradient,) = torch.autograd.grad(found.sum(), c)
    p_w, p_l = math.exp(-3), math.exp(-2)
    assert found.item() == pytest.approx(math.log(1 + p_l / p_w) + 0.4 * 0.7)
    assert gradient.item() == pytest.approx(-p_l / (p_w + p_l))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9, -0.5])
def test_f_dpos_paper_writes_1_minus_our_alpha(alpha):
    """Its f′(u) = (1 − u^{−α})/α, in Wang et al. 2023."""
    log_ratio = torch.linspace(-4, 4, 17, dtype=torch.float64)
    paper = (1 - log_ratio.exp() ** -alpha) / alpha
    torch.testing.assert_close(losses.divergence_score(log_ratio, "alpha", 1 - alpha), paper)


def test_the_papers_alpha_of_0_is_the_reverse_kl():
    log_ratio = torch.linspace(-4, 4, 17, dtype=torch.float64)
    torch.testing.assert_close(losses.divergence_score(log_ratio, "alpha", 1.0), log_ratio)
    near = losses.divergence_score(log_ratio, "alpha", 1 - 1e-6)
    torch.testing.assert_close(near, log_ratio, rtol=0, atol=1e-4)


def test_exos_official_code_is_a_label_smoothing_of_e_to_the_minus_10():
    """Σ p (log p − label), p the softmax of both rewards, the labels 0 and −10."""
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    p, log_p = torch.stack([z / 2, -z / 2]).softmax(0), torch.stack([z / 2, -z / 2]).log_softmax(0)
    official = (p * (log_p - values([0.0, -10.0])[:, None])).sum(0)
    torch.testing.assert_close(losses.exo(z, 4.54e-5), official, rtol=0, atol=5e-5)


def test_sppo_is_twice_the_official_loss_whose_targets_are_those_of_certain_labels():
    """½(Δw − (p − ½)/β)² + ½(Δl − (1 − p − ½)/β)² with a win rate p of 1."""
    beta, start = SPPO().beta, some()
    assert beta == 0.001
    win, lose = 1.0, 0.0
    official = (
        (start.chosen_log_ratio - (win - 0.5) / beta).square()
        + (start.rejected_log_ratio - (lose - 0.5) / beta).square()
    ) / 2
    torch.testing.assert_close(SPPO().losses(start), 2 * official)
