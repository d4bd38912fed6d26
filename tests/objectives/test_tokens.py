"""Objectives that weigh tokens: SamPO, LD-DPO and WPO."""

import itertools
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer

from rotopo.data.batch import Role
from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import DPO, LDDPO, SamPO, losses
from tests.objectives.cases import log_probs, losses_of, rewards_of, shares, some, squared


def pairs(w: list[int], l: list[int], rows: list[int] | None = None) -> PairLogProbs:  # noqa: E741
    numbers = torch.linspace(-9, -2, 4 * len(w), dtype=torch.float64)
    return log_probs(*numbers.view(4, -1), w, l, rows)


def at_epoch(objective: SamPO, epoch: int) -> SamPO:
    objective.trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    objective.trainer.fit_loop.epoch_progress.current.completed = epoch
    return objective


@pytest.mark.parametrize("objective", [SamPO(0.3), LDDPO(0.3, 0.0), LDDPO(0.3, 0.5)])
def test_of_equal_lengths_both_are_dpo(objective):
    equal = pairs([3, 1, 5], [3, 1, 5])
    torch.testing.assert_close(losses_of(objective, equal), DPO(0.3).losses(equal))


def test_ld_dpo_is_dpo_at_1_and_dpo_on_cut_responses_at_0():
    start = pairs([5, 2, 3], [2, 4, 3])
    torch.testing.assert_close(LDDPO(0.3, 1.0).losses(start), DPO(0.3).losses(start))
    kept = torch.tensor([sum(shares(5)[:2]), 1.0, 1.0], dtype=torch.float64)
    others = torch.tensor([1.0, sum(shares(4)[:2]), 1.0], dtype=torch.float64)
    cut = log_probs(
        start.chosen * kept,
        start.rejected * others,
        start.reference_chosen * kept,
        start.reference_rejected * others,
    )
    torch.testing.assert_close(LDDPO(0.3, 0.0).losses(start), DPO(0.3).losses(cut))


def test_ld_dpos_weight_is_linear_in_alpha():
    start = pairs([5, 2, 3], [2, 4, 3])
    margins = [LDDPO(0.3, alpha).margin(start) for alpha in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(margins[1], 0.75 * margins[0] + 0.25 * margins[2])


def test_sampo_takes_as_many_tokens_of_the_longer_response_as_the_shorter_has():
    """Any of them, each draw about as often; the shorter response is taken whole."""
    start = pairs([5], [2])
    ratio = start.chosen_log_ratio.item()
    possible = [sum(choice) * ratio for choice in itertools.combinations(shares(5), 2)]
    distinct = sorted({round(x, 9) for x in possible})
    counts = dict.fromkeys(distinct, 0)
    for seed in range(400):
        chosen, rejected = rewards_of(SamPO(1.0, seed), start)
        torch.testing.assert_close(rejected, start.rejected_log_ratio)
        counts[round(chosen.item(), 9)] += 1
    expected = {x: 40 * sum(abs(p - x) < 1e-8 for p in possible) for x in distinct}
    for x in distinct:  # four standard deviations
        assert abs(counts[x] - expected[x]) <= 4 * expected[x] ** 0.5


def test_sampo_draws_the_same_for_a_row_an_epoch_and_a_seed_whatever_the_batch():
    w, l, rows = [9, 8, 2, 7], [3, 9, 6, 4], [17, 4, 0, 99]  # noqa: E741
    start = pairs(w, l, rows)
    objective = SamPO(0.3)
    together = losses_of(objective, start)
    for i in range(4):
        alone = log_probs(
            *(
                getattr(start, name)[i : i + 1]
                for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")
            ),
            [w[i]],
            [l[i]],
            [rows[i]],
        )
        torch.testing.assert_close(losses_of(objective, alone), together[i : i + 1])
    torch.testing.assert_close(losses_of(SamPO(0.3), start), together)


def test_sampo_draws_afresh_for_another_seed_row_or_epoch_and_validates_on_one_draw():
    start = pairs([40, 31, 12, 37], [23, 39, 26, 14])
    first = losses_of(SamPO(0.3), start)
    assert (losses_of(SamPO(0.3, seed=1), start) != first).all()
    moved = replace(start, rows=start.rows + 100)
    assert (losses_of(SamPO(0.3), moved) != first).all()
    later = at_epoch(SamPO(0.3), 1)
    assert (losses_of(later, start) != first).all()
    torch.testing.assert_close(losses_of(at_epoch(SamPO(0.3), 0), start), first)
    validated = [losses_of(at_epoch(SamPO(0.3), epoch).eval(), start) for epoch in (0, 1, 5)]
    assert torch.equal(validated[0], validated[1])
    assert torch.equal(validated[0], validated[2])


def test_sampo_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    losses_of(SamPO(0.3), pairs([5], [2]))
    assert torch.equal(torch.get_rng_state(), state)


def with_likelihoods(
    chosen: list[tuple[float, float]], rejected: list[tuple[float, float]]
) -> PairLogProbs:
    """A pair whose tokens have these p and Σp² under the policy."""
    start = pairs([len(chosen)], [len(rejected)])
    tokens = start.tokens
    log_prob = torch.zeros_like(tokens.log_prob)
    sum_squared = torch.ones_like(log_prob)
    for role, numbers in (
        (Role.CHOSEN, chosen),
        (Role.REJECTED, rejected),
        (Role.MISMATCHED, [(1e-9, 1e-3)]),
    ):
        of_role = tokens.role == role
        log_prob[of_role] = log_prob.new_tensor([p for p, _ in numbers]).log()
        sum_squared[of_role] = log_prob.new_tensor([q for _, q in numbers])
    return replace(start, tokens=replace(tokens, log_prob=log_prob, sum_squared=sum_squared))


def test_wpos_weights_are_those_worked_out_by_hand():
    """Two tokens of p ½ and ¼ against Σp² of .5 and .3, times one of p .1 against .2."""
    made = with_likelihoods([(0.5, 0.5), (0.25, 0.3)], [(0.1, 0.2)])
    weight = (0.5 / 0.5 * 0.25 / 0.3) ** 0.5 * (0.1 / 0.2)
    found = DPO(0.3, wpo=True).losses(made)
    torch.testing.assert_close(found, weight * DPO(0.3).losses(made), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "product", "clamped"),
    [
        ((0.9, 0.6), (0.8, 0.5), 1.5 * 1.6, 1.0),
        ((0.8, 0.5), (0.1, 0.25), 1.6 * 0.4, 1.6 * 0.4),  # the pair's weight, not each response's
        ((0.1, 0.25), (0.9, 0.3), 0.4 * 3, 1.0),
        ((0.3, 0.3), (0.7, 0.7), 1.0, 1.0),
    ],
)
def test_wpos_clamp_is_on_the_pairs_weight(chosen, rejected, product, clamped):
    made = with_likelihoods([chosen], [rejected])
    made = replace(made, chosen=made.chosen.detach().requires_grad_())
    plain = DPO(0.3).losses(made)
    (slope,) = torch.autograd.grad(plain.sum(), made.chosen, retain_graph=True)
    for settings, weight in (({}, clamped), ({"wpo_clamp": False}, product)):
        loss = DPO(0.3, wpo=True, **settings).losses(made)
        (found,) = torch.autograd.grad(loss.sum(), made.chosen)
        torch.testing.assert_close(loss, weight * plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(found, weight * slope, rtol=1e-12, atol=0)


def test_wpos_weights_have_no_gradient_and_combine_with_the_other_variants():
    start = some()
    for settings in (
        {},
        {"label_smoothing": 0.2},
        {"divergence": "js"},
        {"normalise_length": True},
    ):
        weighted = DPO(0.3, wpo=True, **settings).losses(start)
        plain = DPO(0.3, **settings).losses(start)
        weights = (weighted / plain).detach()
        found = torch.autograd.grad(weighted.sum(), start.chosen, retain_graph=True)[0]
        expected = torch.autograd.grad(plain.sum(), start.chosen, retain_graph=True)[0]
        torch.testing.assert_close(found, weights * expected)


def test_wpos_token_weight_is_1_for_tokens_as_likely_as_the_policys_own():
    """Σp² is the mean likelihood of a token that the policy draws itself."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    mean = (p * p).sum()
    assert losses.wpo_log_weight(mean.log(), mean).item() == pytest.approx(0)
    assert squared(0, Role.CHOSEN, 0) < 1
