"""Outcomes by distance: what counts of a run, what is read off, and what a resample changes."""

import math

import numpy as np
import pytest

from rotopo.compare.frontiers import Frontier, Measured, levels, pair_of_runs


def test_only_a_distance_never_reached_before_counts():
    distance = np.array([0.0, 1.0, 0.5, 1.0, 3.0])
    found = Frontier.of(distance, np.array([0.0, 10.0, 99.0, 99.0, 30.0]))
    assert found.distance.tolist() == [0, 1, 3]
    assert found.at(0.5) == 5
    assert found.at(2) == 20
    assert found.at(3) == 30


def test_nothing_is_extrapolated():
    found = Frontier.of(np.array([1.0, 2.0]), np.array([0.5, 0.7]))
    assert math.isnan(found.at(0.99))
    assert math.isnan(found.at(2.01))


def test_levels_divide_what_all_reach():
    runs = [np.array([0, 1.0, 4.0]), np.array([0, 3.0, 2.0]), np.array([1.0, 5.0])]
    assert levels(runs) == [1.5, 2.0, 2.5]
    assert levels([np.array([0, 1.0]), np.array([1.0, 2.0])]) == []


def test_means_are_over_responses_and_the_distance_is_a_root():
    # Two groups: of one response with a KL of 4, and of three with one of 16 each.
    measured = Measured(
        np.array([[0.0, 0.0], [4.0, 48.0]]),
        np.array([1, 3]),
        np.array([[0.0, 0.0], [1.0, 3.0]]),
        np.array([2, 2]),
    )
    found = measured.frontier()
    assert found.distance == pytest.approx([0, math.sqrt(13)])
    assert found.outcome.tolist() == [0, 1]
    assert measured.frontier(np.array([1, 1])).distance == pytest.approx([0, 4])


def test_the_bootstrap_of_two_runs_covers_what_another_held_out_set_would_give():
    """With the distance's own error: the outcome is a function of the distance, which is measured
    on the groups too. By the levels of the true distances the true difference is known."""
    generator = np.random.default_rng(0)
    groups, covered, alone = 80, 0, []
    for trial in range(150):
        runs = []
        for slope in (1.0, 1.4):
            true = np.linspace(0, 2, 5)
            kl = true[:, None] ** 2 * generator.gamma(2, 1 / 2, size=groups)
            hard = generator.normal(size=groups)
            outcome = slope * true[:, None] + 0.3 * hard + 0.3 * generator.normal(size=(5, groups))
            counts = np.ones(groups)
            runs.append(Measured(kl, counts, outcome, counts))
        (found,) = pair_of_runs(runs[1], runs[0], [1.0], 200, seed=trial)
        covered += found.interval[0] <= 0.4 <= found.interval[1]
        alone.append(found.difference)
    assert 0.89 <= covered / 150 <= 0.99
    assert np.mean(alone) == pytest.approx(0.4, abs=0.05)


def test_a_resample_without_responses_reaches_nothing():
    """Responses to one of two groups: a quarter of the resamples have none."""
    counts = np.array([4, 0])
    one = Measured(np.array([[0.0, 0], [16, 0]]), counts, np.zeros((2, 2)), np.ones(2))
    (found,) = pair_of_runs(one, one, [1.0])
    assert found.reached == pytest.approx(0.75, abs=0.05)
    assert found.interval == (0, 0)


def test_a_level_that_few_resamples_reach_has_no_interval():
    one = Measured(np.array([[0.0] * 4, [0, 0, 0, 16.0]]), np.ones(4), np.zeros((2, 4)), np.ones(4))
    (at_end,) = pair_of_runs(one, one, [2.0])
    assert at_end.difference == 0
    assert at_end.reached == pytest.approx(1 - 0.75**4, abs=0.05)
    assert at_end.interval == (0, 0)
    (beyond,) = pair_of_runs(one, one, [3.0])
    assert math.isnan(beyond.difference)
    assert beyond.interval is None
