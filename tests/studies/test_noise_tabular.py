"""The tabular task: what is drawn, where training starts, and each step of the procedure."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from rotopo.errors import InputError
from rotopo.objectives import BCO, DPO, IPO, NCA, ROPO, SFT, TYPO, DrDPO, HolderDPO, RobustDPO
from rotopo.studies import noise_tabular
from rotopo.studies.noise_methods import Method
from rotopo.studies.noise_tabular import (
    CANDIDATES,
    TRAINING,
    Pairs,
    Policy,
    Tabular,
    drawn,
    judges_each_pair,
    labelled,
    network,
    of_pairs,
    sees_margins_only,
    truth,
)

SHORT = Tabular(epochs=2, rounds=2)


@pytest.fixture(scope="module")
def data():
    return drawn(3)


def moved_policy(module, data, seed=3) -> Policy:
    """A policy whose last layer is no longer zero."""
    policy = Policy(module, data[0][:TRAINING], seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        policy.network[-1].weight.normal_(0, 0.3, generator=generator)
    return policy


def some_pairs(n: int = 100) -> Pairs:
    candidates = np.random.default_rng(0).permuted(np.tile(np.arange(8), (n, 1)), axis=1)
    return Pairs(torch.arange(n), *torch.from_numpy(candidates[:, :2]).unbind(1))


def test_labels_follow_the_true_reward(data):
    prompts, _ = data
    A, b = truth()
    assert prompts.features.shape == (2500, 8, 16)
    for p, c in ((0, 0), (17, 5), (2499, 7)):
        x, y = prompts.features[p, c].double().numpy().reshape(2, 8)
        assert prompts.reward[p, c].item() == pytest.approx(x @ A @ y + b @ y, abs=1e-4)
    rows = torch.arange(2500)
    better, worse = prompts.reward[rows, prompts.better], prompts.reward[rows, prompts.worse]
    assert (better > worse).all()
    clean = labelled(prompts, np.zeros(2500, bool))
    assert torch.equal(clean.chosen, prompts.better)
    assert torch.equal(clean.rejected, prompts.worse)


def test_draws_are_standard_normal_and_every_pair_is_as_likely(data):
    prompts, _ = data
    features = prompts.features.double()
    assert (features[:, :, :8] == features[:, :1, :8]).all()  # x is the prompt's
    for part in (features[:, 0, :8], features[:, :, 8:]):
        # Five standard errors of the mean and of the variance.
        n = part.numel()
        assert abs(part.mean().item()) < 5 / math.sqrt(n)
        assert abs(part.var().item() - 1) < 5 * math.sqrt(2 / n)
    counts = torch.bincount(torch.cat([prompts.better, prompts.worse]), minlength=8)
    assert (counts - 625).abs().max() < 5 * math.sqrt(5000 / 8)


def test_flips_come_at_the_rate_and_stay_at_higher_rates(data):
    prompts, draws = data
    train = prompts[:TRAINING]
    for rate in (0.2, 0.4):
        assert abs((draws < rate).mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / TRAINING)
    pairs = labelled(train, draws < 0.2)
    right = train.reward[pairs.prompt, pairs.chosen] > train.reward[pairs.prompt, pairs.rejected]
    assert np.array_equal(right.numpy(), draws >= 0.2)


def test_seeds_differ_in_all_but_the_truth(data):
    other, draws = drawn(4)
    assert not torch.equal(other.features, data[0].features)
    assert not np.array_equal(draws, data[1])
    assert not torch.equal(network(3)[0].weight, network(4)[0].weight)
    assert all(np.array_equal(a, b) for a, b in zip(truth(), truth(), strict=True))


def test_the_network_is_the_one_that_torch_would_make():
    made = network(0)
    plain = torch.nn.Sequential(
        torch.nn.Linear(16, 96),
        torch.nn.ReLU(),
        torch.nn.Linear(96, 96),
        torch.nn.ReLU(),
        torch.nn.Linear(96, 1),
    )
    assert repr(made) == repr(plain)
    for ours, theirs in zip(made[:4:2].parameters(), plain[:4:2].parameters(), strict=True):
        # Of 96 and more uniform values the largest comes near the bound.
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.1)
        assert abs(ours.mean().item()) < ours.abs().max().item() * 5 / math.sqrt(3 * ours.numel())


def test_the_policy_starts_as_the_reference(data):
    train = data[0][:TRAINING]
    pairs = labelled(train, data[1] < 0.2)
    for module, loss in (
        (DPO(), math.log(2)),
        (ROPO(), 56 / 225 * math.log(2) + 4 * 14**2 / 225 / 2),
        (IPO(), 25),
    ):
        policy = Policy(module, train, 3)
        assert torch.allclose(policy.log_policy(train), torch.tensor(-math.log(8)), atol=1e-6)
        assert np.abs(policy.margins(train, pairs)).max() < 1e-6
        assert policy.losses(pairs) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("module", [DPO(), RobustDPO(), IPO(), DrDPO(), HolderDPO(), ROPO()])
def test_only_the_pair_passes_the_network_where_the_others_have_no_gradient(module, data):
    assert sees_margins_only(module)
    gradients, losses = [], []
    for margin_only in (True, False):
        policy = moved_policy(module, data)
        policy.margin_only = margin_only
        values = policy.module.losses(policy.log_probs(some_pairs()))
        values.mean().backward()
        losses.append(values.detach())
        # The last bias moves all candidates alike.
        gradients.append([p.grad for p in policy.network.parameters()][:-1])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for pair_alone, all_candidates in zip(*gradients, strict=True):
        scale = all_candidates.abs().max().item()
        torch.testing.assert_close(pair_alone, all_candidates, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("module", [NCA(), BCO(), SFT(), TYPO()])
def test_others_see_all_candidates(module):
    assert not sees_margins_only(module)


def test_the_kl_to_the_reference_is_exact():
    log_policy = torch.randn(5, CANDIDATES, generator=torch.Generator().manual_seed(0))
    log_policy = log_policy.double().log_softmax(1)
    found = of_pairs(log_policy, torch.zeros(5).long(), torch.ones(5).long()).reference_kl
    uniform = torch.full_like(log_policy, 1 / CANDIDATES)
    torch.testing.assert_close(found, kl_div(log_policy, uniform, reduction="none").sum(1))


def test_a_loss_that_depends_on_the_pairs_beside_it_is_known():
    assert judges_each_pair(ROPO())
    assert not judges_each_pair(DrDPO())


@pytest.mark.parametrize("name", ["ROPO", "BCO", "TYPO", "ROPO+filter+sampling"])
def test_a_run_depends_on_its_seed_alone(name):
    torch.manual_seed(0)
    before = SHORT.run(Method.named(name), 0.2, 5)
    torch.manual_seed(1)
    np.random.seed(1)
    SHORT.run(Method.named(name), 0.4, 6)
    assert SHORT.run(Method.named(name), 0.2, 5) == before
    assert SHORT.run(Method.named(name), 0.2, 6) != before


def test_training_learns_clean_labels():
    outcome = SHORT.run(Method.named("DPO"), 0.0, 5)
    assert outcome.accuracy > 0.7
    assert outcome.auroc is outcome.recall is None
    assert outcome.rounds == []


@pytest.mark.parametrize("name", ["DPO", "ROPO"])
def test_a_filter_that_drops_nothing_is_plain_training(name):
    plain = SHORT.run(Method.named(name), 0.4, 5)
    kept_all = Tabular(epochs=2, rounds=2, rho=0.0)
    for procedure in ("+filter", "+filter+sampling"):
        outcome = kept_all.run(Method.named(name + procedure), 0.4, 5)
        assert [(r.dropped, r.accepted) for r in outcome.rounds] == [(0, 0)]
        assert (outcome.accuracy, outcome.auroc, outcome.recall) == (
            plain.accuracy,
            plain.auroc,
            plain.recall,
        )


def test_the_filter_drops_the_largest_losses():
    prompts, draws = drawn(5)
    flipped, train = draws < 0.4, prompts[:TRAINING]
    pairs = labelled(train, flipped)
    policy = Policy(ROPO(), train, 5)
    policy.fit(pairs, 1)
    largest = np.argsort(policy.losses(pairs))[-200:]
    (round_,) = SHORT.run(Method.named("ROPO+filter"), 0.4, 5).rounds
    assert (round_.round, round_.dropped, round_.accepted) == (1, 200, 0)
    assert round_.flipped == flipped[largest].sum()


def test_all_pairs_are_scored_in_every_round():
    """A pair that was dropped comes back when its loss falls."""
    rounds = Tabular(epochs=8, rounds=8).run(Method.named("ROPO+filter"), 0.4, 5).rounds
    assert [r.dropped for r in rounds] == [200] * 7
    assert len({r.flipped for r in rounds}) > 1


def test_new_pairs_are_the_best_and_the_worst_of_the_pool(data):
    policy = moved_policy(ROPO(), data)
    rewards = policy.log_policy(policy.train)
    pairs = labelled(policy.train, data[1] < 0.4)
    everything = Tabular(samples=3000, temperature=10.0)  # so that all candidates are drawn
    new = everything._new_pairs(policy, pairs[torch.arange(10)], np.inf, np.random.default_rng(0))
    assert torch.equal(new.prompt, torch.arange(10))
    assert torch.equal(new.chosen, rewards[:10].argmax(1))
    assert torch.equal(new.rejected, rewards[:10].argmin(1))

    cold = Tabular(samples=1, temperature=1e-7)  # so that the likeliest candidate is drawn
    new = cold._new_pairs(policy, pairs, np.inf, np.random.default_rng(0))
    assert torch.equal(new.chosen, rewards.argmax(1))
    of_original = torch.stack([pairs.chosen, pairs.rejected], 1)
    lower = rewards.gather(1, of_original).argmin(1, keepdim=True)
    assert torch.equal(new.rejected, of_original.gather(1, lower).squeeze(1))


def test_new_pairs_are_accepted_up_to_the_threshold(data):
    policy = moved_policy(ROPO(), data)
    pairs = labelled(policy.train, data[1] < 0.4)

    def new(at_most: float) -> Pairs:
        return Tabular()._new_pairs(policy, pairs, at_most, np.random.default_rng(0))

    everything = new(np.inf)
    losses = policy.losses(everything)
    some = new(np.median(losses))
    assert len(everything) == TRAINING
    assert len(some) == TRAINING / 2
    assert torch.equal(some.prompt, everything.prompt[losses <= np.median(losses)])
    assert len(new(-np.inf)) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_policy_at_the_temperature(temperature, data):
    policy = moved_policy(DPO(), data)
    log_policy = policy.log_policy(policy.train)[7]
    low, second, *others = log_policy.argsort().tolist()
    n = 20_000
    # The originals are the two least likely ones, so that any other sample becomes the best.
    pairs = Pairs(*(torch.full((n,), place) for place in (7, second, low)))
    new = Tabular(samples=1, temperature=temperature)._new_pairs(
        policy, pairs, np.inf, np.random.default_rng(0)
    )
    expected = (log_policy / temperature).softmax(0)
    found = torch.bincount(new.chosen, minlength=8) / n
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0.015)
    assert found[low] == 0


def test_objectives_with_running_values_see_each_step_once(data):
    policy = Policy(BCO(), data[0][:TRAINING], 3)
    policy.fit(labelled(policy.train, data[1] < 0.2)[torch.arange(250)], 2)
    assert policy.module.reward_sums[1].tolist() == [500, 500]
    assert BCO().reward_sums[1].tolist() == [0, 0]


def test_training_that_diverges_is_an_error(monkeypatch):
    monkeypatch.setattr(noise_tabular, "LEARNING_RATE", 1e30)
    with pytest.raises(InputError, match="diverged"):
        SHORT.run(Method.named("DPO"), 0.2, 5)
