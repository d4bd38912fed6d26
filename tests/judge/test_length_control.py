"""Win rates at equal length, against the published definition and by hand."""

import numpy as np
import pytest
from scipy.optimize import minimize

from rotopo.judge.length_control import length_controlled_interval, length_controlled_win_rate
from rotopo.metrics.bootstrap import mean_interval


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_length_control_of_two_lengths_by_hand():
    """Longer by one wins 90 of 100, shorter by one 40 of 100: two parameters fit both exactly."""
    preference = np.repeat([1.0, 0, 1, 0], [90_000, 10_000, 40_000, 60_000])
    longer = np.repeat([1, -1], 100_000)
    # logit .9 = 2.1972, logit .4 = -0.4055: half way between them is 0.8959, whose σ is 0.7101.
    assert length_controlled_win_rate(preference, longer) == pytest.approx(0.7101, abs=1e-4)


def test_length_control_is_the_published_definition():
    """Of preferences that follow the paper's model exactly, the fit finds its parameters."""
    generator = np.random.default_rng(0)
    difference = generator.integers(-60, 90, size=3000)
    difficulty = generator.normal(size=3000)
    theta, phi, psi = -0.4, 1.3, 0.7
    length = np.tanh(difference / difference.std(ddof=1))
    preference = sigmoid(theta + phi * length + psi * difficulty)
    assert length_controlled_win_rate(preference, difference, difficulty) == pytest.approx(
        sigmoid(theta + psi * difficulty).mean(), abs=1e-3
    )
    without = sigmoid(theta + phi * length)
    found = length_controlled_win_rate(without, difference)
    assert found == pytest.approx(sigmoid(theta), abs=1e-3)
    assert found < 0.45 < without.mean()


def test_length_control_minimises_the_penalised_likelihood():
    generator = np.random.default_rng(1)
    preference = generator.choice([0, 0.5, 1], size=40)
    difference = generator.integers(-9, 9, size=40)
    x = np.tanh(difference / difference.std(ddof=1))

    def loss(parameters):
        p = sigmoid(parameters[0] + parameters[1] * x)
        likelihood = preference * np.log(p) + (1 - preference) * np.log(1 - p)
        theta, phi = parameters
        return theta**2 / 200 + phi**2 / 2 - likelihood.sum()

    theta = minimize(loss, [0, 0], tol=1e-12).x[0]
    assert length_controlled_win_rate(preference, difference) == pytest.approx(
        sigmoid(theta), abs=1e-6
    )


def test_length_control_without_differences_in_length_is_the_win_rate():
    preference = np.repeat([1, 0, 0.5], [30_000, 10_000, 5000])
    for difference in (np.zeros(45_000, int), np.full(45_000, 7)):
        assert length_controlled_win_rate(preference, difference) == pytest.approx(
            preference.mean(), abs=1e-5
        )


def test_length_control_of_a_policy_that_always_wins():
    longer = np.arange(50)
    assert 0.97 < length_controlled_win_rate(np.ones(50), longer - 25) <= 1
    assert length_controlled_win_rate(np.ones(1), np.array([3])) > 0.9
    assert length_controlled_win_rate(np.full(50, 0.5), longer * 0) == 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_length_control_is_refused_where_no_prompt_shows_equal_length(sign):
    preference = np.random.default_rng(0).choice([0.0, 1.0], size=60)
    longer = sign * np.arange(1, 61)
    assert length_controlled_win_rate(preference, longer) is None
    assert length_controlled_interval(preference, longer) is None
    for differences in (longer - sign, longer - 2 * sign, np.full(60, sign)):
        rate = length_controlled_win_rate(preference, differences)
        low, high = length_controlled_interval(preference, differences)
        assert low < rate < high


def test_length_controlled_interval_without_a_length_term_is_that_of_the_win_rate():
    preference = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=300)
    found = length_controlled_interval(preference, np.full(300, 4), level=0.8)
    assert found == pytest.approx(mean_interval(preference, level=0.8, resamples=200), abs=1e-4)
    assert length_controlled_interval(np.full(9, 0.5), np.zeros(9, int)) == (0.5, 0.5)


def test_length_controlled_interval_is_of_the_fits_of_whole_resamples():
    generator = np.random.default_rng(1)
    preference, longer = generator.choice([0.0, 1.0], size=80), generator.integers(-30, 40, 80)
    drawn = np.random.default_rng(5).integers(80, size=(40, 80))
    rates = [length_controlled_win_rate(preference[i], longer[i]) for i in drawn]
    found = length_controlled_interval(preference, longer, level=0.5, resamples=40, seed=5)
    assert found == pytest.approx(np.quantile(rates, [0.25, 0.75]))
    assert length_controlled_interval(preference, longer, resamples=9000) == (
        length_controlled_interval(preference, longer, resamples=200)
    )


@pytest.mark.slow
def test_coverage_of_the_length_controlled_interval():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        longer = generator.integers(-30, 60, 150)
        chance = sigmoid(-0.3 + 1.2 * np.tanh(longer / 26))  # 26 is the standard deviation
        preference = (generator.random(150) < chance).astype(float)
        low, high = length_controlled_interval(preference, longer, resamples=200, seed=trial)
        covered += low <= sigmoid(-0.3) <= high
    assert 0.9 <= covered / 200 <= 0.99  # 0.95 within some three standard errors
