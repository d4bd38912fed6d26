"""The robust loss, arXiv 2404.04102: what follows from its definition.

The facts are derived from the loss, not quoted from the paper.
"""

import math

import pytest
import torch
from torch import Tensor

from rotopo.objectives import DPO, ROPO, losses
from tests.objectives.cases import log_probs

ALPHAS = [2.5, 6.0, 14.0, 30.0]
alphas = pytest.mark.parametrize("alpha", ALPHAS)
Z = torch.linspace(-40, 40, 4001, dtype=torch.float64)


def weight(z: Tensor, alpha: float) -> Tensor:
    """w(z) of the gradient −β·w(z)·∇(c − r), by autograd through the objective at β = 1."""
    c = z.clone().requires_grad_()
    zero = torch.zeros_like(z)
    found = ROPO(beta=1.0, alpha=alpha).losses(log_probs(c, zero, zero, zero))
    (gradient,) = torch.autograd.grad(found.sum(), c)
    return -gradient


@alphas
def test_the_gradients_weight_is_its_formula(alpha):
    sigma = 1 / (1 + torch.exp(-Z))
    expected = 4 * alpha / (1 + alpha) ** 2 * (1 - sigma) * (1 + alpha * sigma)
    torch.testing.assert_close(weight(Z, alpha), expected, rtol=1e-9, atol=1e-14)


@alphas
def test_chosen_and_rejected_are_pulled_apart_by_beta_times_the_weight(alpha):
    c = torch.tensor([-3.0, -7.0], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([-4.0, -2.0], dtype=torch.float64, requires_grad=True)
    base = torch.full_like(c, -5).detach()
    found = ROPO(beta=0.3, alpha=alpha).losses(log_probs(c, r, base, base))
    to_chosen, to_rejected = torch.autograd.grad(found.sum(), (c, r))
    expected = 0.3 * weight(0.3 * (c - r).detach(), alpha)
    torch.testing.assert_close(to_chosen, -expected)
    torch.testing.assert_close(to_rejected, expected)


@alphas
def test_the_largest_weight_is_1_at_log_alpha_minus_1_over_alpha_plus_1(alpha):
    at = torch.tensor([math.log((alpha - 1) / (alpha + 1))], dtype=torch.float64)
    assert weight(at, alpha).item() == pytest.approx(1, abs=1e-14)
    beside = torch.cat([at - 1e-3, at + 1e-3])
    assert (weight(beside, alpha) < 1).all()
    assert (weight(Z, alpha) <= 1 + 1e-14).all()
    assert abs(Z[weight(Z, alpha).argmax()] - at) <= 0.02


def test_the_published_alphas_numbers():
    assert math.log(13 / 15) == pytest.approx(-0.1431, abs=5e-5)
    lost = weight(torch.tensor([-1e4, -50.0], dtype=torch.float64), 14.0)
    torch.testing.assert_close(lost, torch.full_like(lost, 0.249), rtol=0, atol=5e-4)


@alphas
def test_a_pair_ranked_far_the_other_way_keeps_4_alpha_over_1_plus_alpha_squared(alpha):
    lost = weight(torch.tensor([-1e4], dtype=torch.float64), alpha)
    assert lost.item() == pytest.approx(4 * alpha / (1 + alpha) ** 2, rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.9, 2.0, 2.1, *ALPHAS])
def test_an_undecided_pair_weighs_more_than_a_lost_one_iff_alpha_is_above_2(alpha):
    """Which is why smaller ones are refused; the function itself takes them."""
    z = torch.tensor([0.0, -1e4], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.ropo(z, alpha).sum(), z)
    undecided, lost = (-gradient).tolist()
    assert (undecided - lost > 1e-12) == (alpha > 2)
    assert undecided == pytest.approx(4 * alpha / (1 + alpha) ** 2 / 2 * (1 + alpha / 2))


@pytest.mark.parametrize("alpha", [0.5, 2.0, *ALPHAS])
def test_the_loss_falls_strictly_so_that_ranking_by_it_is_ranking_by_minus_z(alpha):
    z = torch.linspace(-600, 30, 2000, dtype=torch.float64)
    assert (losses.ropo(z, alpha).diff() < 0).all()
    shuffled = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(losses.ropo(shuffled, alpha).argsort(), (-shuffled).argsort())


def noise_aware(z: Tensor) -> Tensor:
    """σ(−z), the part that bears noise: ROPO's loss less DPO's share, in its own scale."""
    alpha = 14.0
    scale = 4 * alpha / (1 + alpha) ** 2
    return (losses.ropo(z, alpha) - scale * losses.dpo(z)) / (scale * alpha)


def test_the_noise_aware_part_of_a_pair_and_of_its_flip_add_up_to_1():
    torch.testing.assert_close(noise_aware(Z) + noise_aware(-Z), torch.ones_like(Z))


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.4])
def test_its_risk_under_symmetric_flips_is_the_clean_risk_on_another_scale(eta):
    """(1−2η)·R + η, whatever the policy: noise does not move the minimiser."""
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 10.0):
        z = 0.5 + spread * torch.randn(500, generator=generator, dtype=torch.float64)
        noisy = ((1 - eta) * noise_aware(z) + eta * noise_aware(-z)).mean()
        assert noisy.item() == pytest.approx((1 - 2 * eta) * noise_aware(z).mean().item() + eta)


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.4])
@alphas
def test_the_whole_loss_does_not_bear_noise_like_that(alpha, eta):
    """No a and b make its noisy risk a·R + b; nor DPO's, which is the rest of it."""
    z = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    for loss in (lambda z: losses.ropo(z, alpha), losses.dpo):
        clean = loss(z)
        noisy = (1 - eta) * clean + eta * loss(-z)
        slopes = noisy.diff() / clean.diff()
        assert (slopes[0] - slopes[1]).abs() > 1e-2


@alphas
def test_the_loss_is_4_alpha_over_1_plus_alpha_squared_of_dpo_and_alpha_noise_aware(alpha):
    scale = 4 * alpha / (1 + alpha) ** 2
    expected = scale * (losses.dpo(Z) + alpha / (1 + torch.exp(Z)))
    torch.testing.assert_close(losses.ropo(Z, alpha), expected, rtol=1e-12, atol=1e-14)
    zero = torch.zeros(1, dtype=torch.float64)
    start = ROPO(alpha=alpha).losses(log_probs(zero, zero, zero, zero))
    assert start.item() == pytest.approx(scale * (math.log(2) + alpha / 2))


def test_beta_and_the_margin_are_dpos():
    c, r = torch.tensor([-3.0, -8.0]), torch.tensor([-4.0, -2.0])
    pairs = log_probs(c, r, torch.full_like(c, -5), torch.full_like(r, -6))
    for ours, dpos in zip(ROPO(0.3).rewards(pairs), DPO(0.3).rewards(pairs), strict=True):
        assert torch.equal(ours, dpos)
    torch.testing.assert_close(ROPO(0.3).losses(pairs), losses.ropo(0.3 * (c - r + 5 - 6), 14.0))
