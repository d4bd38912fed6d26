"""The tabular problem against what can be solved by hand."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from rotopo import objectives
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import BCO, DPO, IPO, KTO, SFT, TYPO, Mixture, RobustDPO, SLiC
from rotopo.studies.tabular import Prompt, Rows, at_strength, population, sampled, solve

THREE = Prompt.of([0.6, 0.3, 0.1], [0.4, 0.4, 0.2])
FOUR = Prompt.of([0.2, 0.4, 0.3, 0.1], [0.25, 0.05, 0.3, 0.4])
TWO = Prompt.of([0.6, 0.4], [0.3, 0.7])


def assert_policy(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def counts(rows: Rows) -> Counter:
    return Counter(zip(rows.chosen.tolist(), rows.rejected.tolist(), strict=True))


def test_the_population_holds_every_ordered_pair_in_exact_proportion():
    found = counts(population(THREE))
    p = {(0, 1): Fraction(2, 3), (0, 2): Fraction(6, 7), (1, 2): Fraction(3, 4)}
    for (i, j), share in p.items():
        assert found[i, j] == 84 * share
        assert found[j, i] == 84 * (1 - share)
    assert sum(found.values()) == 3 * 84


def test_samples_approach_the_population():
    rows = sampled(THREE, 200_000, seed=0)
    exact, drawn = counts(population(THREE)), counts(rows)
    for pair, count in exact.items():
        assert abs(drawn[pair] / 200_000 - count / 252) < 5e-3
    torch.testing.assert_close(rows.reference_samples, THREE.reference, rtol=0, atol=5e-3)
    torch.testing.assert_close(rows.gold, THREE.true, rtol=0, atol=5e-3)


def test_the_same_seed_draws_the_same_sample_and_another_another():
    first, again, other = (sampled(THREE, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first.chosen, again.chosen)
    assert not torch.equal(first.chosen, other.chosen)


@pytest.mark.parametrize("strength", [0.04, 0.2, 0.7, 5.0, 40.0])
@pytest.mark.parametrize("prompt", [THREE, FOUR])
def test_dpos_minimiser_is_the_reference_tilted_by_the_truth(prompt, strength):
    found = solve(at_strength(DPO(), strength), population(prompt))
    assert_policy(found.policy, (prompt.reference.log() + prompt.true.log() / strength).softmax(0))
    assert found.remark == ""


@pytest.mark.parametrize("strength", [0.04, 0.2, 0.7, 5.0, 40.0])
@pytest.mark.parametrize("prompt", [THREE, FOUR])
def test_ipos_minimiser_is_the_reference_tilted_by_the_mean_win_rate(prompt, strength):
    found = solve(at_strength(IPO(), strength), population(prompt))
    p = prompt.true[:, None] / (prompt.true[:, None] + prompt.true)
    tilt = (p - 0.5).sum(1) / (strength * len(prompt.true))
    assert_policy(found.policy, (prompt.reference.log() + tilt).softmax(0))


@pytest.mark.parametrize(
    ("convention", "kl_count"), [("ordered_pairs", 2), ("labelled_pairs", 1), ("official", 1 / 2)]
)
def test_of_two_responses_typo_is_a_weighted_mean_of_truth_and_reference(convention, kl_count):
    """Two probabilities add up to 1, so that log(1 + π_l/π_w) = −log π_w."""
    for strength in (0.05, 0.8, 20.0):
        weight = kl_count * strength
        found = solve(at_strength(TYPO(), strength), population(TWO, convention))
        assert_policy(found.policy, (TWO.true + weight * TWO.reference) / (1 + weight))


def margin_policy(margin: torch.Tensor) -> torch.Tensor:
    """The policy whose log-ratios differ by h, of two responses."""
    return (TWO.reference.log() + torch.stack([margin, torch.zeros_like(margin)])).softmax(0)


def test_smoothed_and_robust_dpo_fit_the_labels_as_they_take_them():
    p, e = TWO.true[0], 0.15
    smoothed = solve(at_strength(DPO(label_smoothing=e), 0.5), population(TWO))
    assert_policy(smoothed.policy, margin_policy(((1 - e) * p + e * (1 - p)).logit() / 0.5))
    robust = solve(at_strength(RobustDPO(flip_rate=e), 0.5), population(TWO))
    assert_policy(robust.policy, margin_policy(((p - e) / (1 - 2 * e)).logit() / 0.5))


def test_f_dpo_fits_the_reward_that_its_divergence_defines():
    """DPO fits every pair exactly, so f′(u_1) − f′(u_2) = log(π*_1/π*_2)/β."""
    found = solve(at_strength(DPO(divergence="js"), 0.5), population(TWO))
    score = (2 * found.policy / (found.policy + TWO.reference)).log()
    torch.testing.assert_close(score[0] - score[1], TWO.true.log().diff().neg()[0] / 0.5)


def test_sft_learns_how_often_each_response_is_chosen():
    chosen = torch.bincount(population(THREE).chosen)
    found = solve(SFT(), population(THREE))
    assert_policy(found.policy, chosen / chosen.sum(dtype=torch.float64))


def test_wpos_weights_do_not_move_dpos_minimiser():
    """A pair weighs the same whichever response wins, and DPO fits every pair exactly."""
    weighted, plain = (
        solve(at_strength(DPO(wpo=wpo), 0.6), population(THREE)) for wpo in (True, False)
    )
    assert_policy(weighted.policy, plain.policy)


def test_bco_comes_to_rest_where_its_shift_is_the_mean_reward():
    """Stationary in the policy with δ held: the two sides of the fixed point, by hand."""
    strength, rows = 1.3, population(THREE)
    log_ratio = (solve(at_strength(BCO(), strength), rows).log_policy).requires_grad_()
    rewards = strength * (log_ratio.log_softmax(0) - THREE.reference.log())
    chosen, rejected = rewards[rows.chosen], rewards[rows.rejected]
    shift = (0.5 * (chosen.mean() + rejected.mean())).detach()
    logsigmoid = torch.nn.functional.logsigmoid
    loss = -(logsigmoid(chosen - shift) + logsigmoid(shift - rejected)).mean()
    (slope,) = torch.autograd.grad(loss, log_ratio)
    assert slope.abs().max() < 1e-6


def test_ktos_baseline_is_the_mean_log_ratio_over_the_data_and_is_held():
    """Every response is in equally many pairs, so that the mean is that over the responses."""
    held = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    policy = THREE.true.log().requires_grad_()
    found = population(THREE).log_probs(policy, held, KTO.needs).mismatched_log_ratio
    torch.testing.assert_close(found.mean(), (held - THREE.reference.log()).mean())
    assert not found.requires_grad


def test_a_hinge_ends_in_its_kink_and_says_so():
    """Each unordered pair of two responses prefers the first by 3 : 2, so that h = δ/β."""
    found = solve(at_strength(SLiC(), 0.5), population(TWO))
    torch.testing.assert_close(
        found.policy, margin_policy(torch.tensor(2.0).double()), rtol=1e-5, atol=0
    )
    assert found.remark == "kink"


class Falls(DPO):
    """A loss without a lowest value."""

    def losses(self, log_probs: PairLogProbs) -> torch.Tensor:
        return -self.margin(log_probs)


class Flat(DPO):
    """A loss that does not depend on the policy."""

    def losses(self, log_probs: PairLogProbs) -> torch.Tensor:
        return 0 * self.margin(log_probs)


def test_losses_without_a_minimum_or_with_many_are_remarked():
    assert "unbounded" in solve(Falls(), population(THREE)).remark
    flat = solve(Flat(), population(THREE))
    assert "apart" in flat.remark
    assert flat.distance(THREE.reference) > 0.3


def test_a_mixture_of_one_is_that_objective_and_weights_weigh():
    alone = solve(at_strength(DPO(), 0.5), population(THREE))
    mixed = solve(at_strength(Mixture([DPO()], [0.3]), 0.5), population(THREE))
    assert_policy(mixed.policy, alone.policy)
    almost_sft = solve(at_strength(Mixture([DPO(), SFT()], [1e-9, 1.0]), 0.5), population(THREE))
    torch.testing.assert_close(
        almost_sft.policy, solve(SFT(), population(THREE)).policy, rtol=0, atol=1e-6
    )


def test_the_strength_goes_into_the_setting_that_the_class_names():
    original = TYPO(kl_weight=0.1)
    assert at_strength(original, 3.0).kl_weight == 3.0
    assert original.kl_weight == 0.1
    assert at_strength(objectives.ORPO(), 3.0).odds_weight == 3.0
    parts = at_strength(Mixture([DPO(), TYPO(), SFT()]), 3.0).parts
    assert (parts[0].beta, parts[1].kl_weight) == (3.0, 3.0)
    assert not hasattr(parts[2], "beta")
    with pytest.raises(InputError, match="kl_weight is -1"):
        at_strength(original, -1.0)


@pytest.mark.parametrize(
    ("true", "reference", "message"),
    [
        ([0.6, 0.3], [0.5, 0.5], "true is"),
        ([0.6, 0.4], [1.0, 0.0], "reference is"),
        ([0.6, 0.4], [0.4, 0.4, 0.2], "same number"),
        ([1.0], [1.0], "two at least"),
    ],
)
def test_what_is_no_pair_of_distributions_is_refused(true, reference, message):
    with pytest.raises(InputError, match=message):
        Prompt.of(true, reference)


@pytest.mark.parametrize("true", [[0.6123, 0.3877], [2**-0.5, 1 - 2**-0.5]])
def test_a_truth_without_a_small_common_denominator_is_refused(true):
    with pytest.raises(InputError, match="rounder numbers"):
        population(Prompt.of([*(p / 2 for p in true), 0.5], [0.4, 0.3, 0.3]))
