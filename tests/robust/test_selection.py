"""The linear program of ROPO's filter, and the choice of new pairs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from rotopo.errors import InputError
from rotopo.robust.selection import best_and_worst, keep, n_kept, threshold

LOSSES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=7)


@given(LOSSES, st.integers(0, 7))
def test_no_choice_of_n_pairs_costs_less(losses, n):
    losses, n = np.array(losses), min(n, len(losses))
    kept = keep(losses, n)
    assert kept.sum() == n
    least = min(
        losses[list(chosen)].sum() for chosen in itertools.combinations(range(len(losses)), n)
    )
    assert losses[kept].sum() == least


@given(LOSSES, st.integers(0, 7))
def test_nor_do_fractions_of_pairs(losses, n):
    losses, n = np.array(losses), min(n, len(losses))
    program = linprog(losses, A_eq=np.ones((1, len(losses))), b_eq=[n], bounds=(0, 1))
    assert losses[keep(losses, n)].sum() == pytest.approx(program.fun, abs=1e-9)


@given(LOSSES, st.integers(0, 7))
def test_of_equal_losses_the_first_are_kept(losses, n):
    kept = keep(np.array(losses), min(n, len(losses)))
    for i, j in itertools.combinations(range(len(losses)), 2):
        if losses[i] == losses[j]:
            assert kept[i] or not kept[j]


def test_how_many_are_kept():
    assert [n_kept(10, rho) for rho in (0, 0.2, 0.25, 0.99, 1)] == [10, 8, 8, 0, 0]
    assert n_kept(3226, 0.2) == 2581
    assert keep(np.array([3.0, 1.0, 2.0]), 3).all()


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(InputError, match="1 of 3 pairs"):
        keep(np.array([1.0, np.nan, 2.0]), 2)


def test_the_best_and_the_worst_of_a_pool():
    rewards = np.array(
        [
            [0.1, 0.4, -0.3, 0.4],
            [0.2, 0.1, np.nan, np.nan],
            [0.5, 0.5, 0.5, np.nan],
            [0.5, np.nan, np.nan, np.nan],
        ]
    )
    best, worst, differ = best_and_worst(rewards)
    assert differ.tolist() == [True, True, False, False]
    assert best[:2].tolist() == [1, 0]
    assert worst[:2].tolist() == [2, 1]


def test_a_pool_against_its_first():
    rewards = np.array([[0.1, 0.4, -0.3], [0.1, 0.6, -0.3], [0.1, 0.1, np.nan]])
    best, worst, differ = best_and_worst(rewards, with_first=True)
    assert differ.tolist() == [True, True, False]
    assert (best[0], worst[0]) == (0, 2)
    assert (best[1], worst[1]) == (1, 0)


def test_the_threshold_is_a_quantile_of_the_kept():
    assert threshold(np.array([4.0, 1.0, 2.0]), 0.5) == 2.0
    assert threshold(np.array([4.0, 1.0, 2.0]), 0.0) == 1.0
    assert threshold(np.array([4.0, 1.0, 2.0, 3.0]), 0.5) == 2.5
