"""Whether arms are told apart: on simulated tables, whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from rotopo.compare.differences import Difference, holm, power, smallest_difference
from rotopo.compare.frontiers import Measured, levels

GROUPS, POINTS = 60, 8


def runs(generator: np.random.Generator, speed: float, seeds: int, better: float = 0.0):
    """Measured runs of an arm: an accuracy that saturates with √KL, and more by ``better``.

    What varies from seed to seed: how far a run goes and how well it does; from group to group:
    how hard it is, the same at all points, and what else is measured there.
    """
    found = []
    for _ in range(seeds):
        progress = np.linspace(0, 1, POINTS) ** 0.7
        far = speed * progress * np.exp(0.1 * generator.normal())
        mean = 0.6 + 0.15 * (1 - np.exp(-far)) + 0.01 * generator.normal() + better
        hard = 0.25 * generator.normal(size=GROUPS)
        outcome = mean[:, None] + hard + 0.1 * generator.normal(size=(POINTS, GROUPS))
        kl = far[:, None] ** 2 * generator.gamma(4, 1 / 4, size=(POINTS, GROUPS))
        counts = generator.integers(1, 4, size=GROUPS)
        found.append(Measured(kl * counts, counts, outcome * counts, counts))
    return found


def compared(generator, seeds: int, better: float = 0.0) -> list[list[Difference]]:
    """Two arms, one of which moves half as fast again, beside a third, at three levels fixed by
    runs of their own."""
    speeds = (2.0, 3.0, 2.5)
    tuning = [run.frontier().distance for speed in speeds for run in runs(generator, speed, 1)]
    at = levels([distances * 0.8 for distances in tuning])
    tables = []
    for number, speed in enumerate(speeds):
        frontiers = [r.frontier() for r in runs(generator, speed, seeds, better * (number > 0))]
        tables.append(np.array([[one.at(level) for level in at] for one in frontiers]))
    first, *others = tables
    return [
        [Difference.of((other - first)[:, i][~np.isnan((other - first)[:, i])]) for i in range(3)]
        for other in others
    ]


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("repetitions", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_arms_that_are_alike_are_seldom_told_apart(seeds, repetitions):
    generator = np.random.default_rng(seeds)
    alone, family, n = 0, 0, 0
    for _ in range(repetitions):
        p_values = [d.p for arm in compared(generator, seeds) for d in arm]
        alone += sum(p <= 0.05 for p in p_values)
        family += min(holm(p_values)) <= 0.05
        n += len(p_values)
    spread = 3 * np.sqrt(0.05 * 0.95 / repetitions)
    print(f"seeds {seeds}: false {alone / n:.4f}, by family {family / repetitions:.4f}")
    assert alone / n <= 0.06 + (spread if repetitions < 5000 else 0)
    assert family / repetitions <= 0.06 + (spread if repetitions < 5000 else 0)


@pytest.mark.parametrize("seeds", [3, 10])
def test_a_true_difference_is_found_as_often_as_the_closed_form_says(seeds):
    generator = np.random.default_rng(0)
    many = compared(generator, 600)[1][0]  # what varies from seed to seed
    better = 1.2 * many.sd
    found = [compared(generator, seeds, better)[1][0].p <= 0.05 for _ in range(150)]
    assert np.mean(found) == pytest.approx(power(1.2, seeds), abs=0.12)  # 3 standard errors


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("effect", [0.0, 0.3, 1.0])
def test_power_is_that_of_the_noncentral_t(seeds, effect):
    critical, shift = stats.t.ppf(0.975, seeds - 1), effect * np.sqrt(seeds)
    theirs = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
    assert power(effect, seeds) == pytest.approx(theirs, abs=1e-8)
    assert power(smallest_difference(seeds), seeds) == pytest.approx(0.8)


def test_the_interval_and_p_are_those_of_scipys_paired_t_test():
    differences = np.random.default_rng(0).normal(0.5, 1, size=5)
    found, theirs = Difference.of(differences), stats.ttest_1samp(differences, 0)
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval()))


def test_differences_that_do_not_vary():
    assert Difference.of(np.zeros(3)).p == 1
    assert Difference.of(np.full(3, 0.25)).p == 0
    alone = Difference.of(np.array([0.3]))
    assert (alone.mean, alone.interval, alone.p, alone.smallest) == (0.3, None, None, None)


def test_holm():
    # Holm (1979) by hand: 4 × .01, then 3 × .03, then no less than that.
    assert holm([0.04, 0.01, 0.5, 0.03]) == pytest.approx([0.09, 0.04, 0.5, 0.09])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
