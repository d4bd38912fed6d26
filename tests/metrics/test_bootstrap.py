"""Bootstrap intervals: their coverage, and what clusters do to them."""

import numpy as np
import pytest
from scipy import stats

from rotopo.metrics.bootstrap import mean_interval


def test_the_interval_is_scipys_up_to_chance():
    values = np.random.default_rng(0).normal(2, 3, size=200)
    low, high = mean_interval(values, resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_coverage_of_a_share():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = mean_interval(generator.random(120) < 0.7, resamples=400, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98  # 0.95 within three standard errors


def test_coverage_of_clustered_values_needs_the_clusters():
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 8)
    covered, ignoring = 0, 0
    for trial in range(200):
        values = generator.normal(size=40)[clusters] + 0.3 * generator.normal(size=len(clusters))
        low, high = mean_interval(values, clusters.tolist(), resamples=400, seed=trial)
        covered += low <= 0 <= high
        low, high = mean_interval(values, resamples=400, seed=trial)
        ignoring += low <= 0 <= high
    assert covered / 200 > 0.89
    assert ignoring / 200 < 0.7


def test_a_cluster_of_each_value_is_no_cluster():
    values = np.random.default_rng(2).random(50)
    assert mean_interval(values, [f"film {i}" for i in range(50)]) == mean_interval(values)


def test_clusters_of_uneven_size_weigh_by_their_size():
    # Two clusters: each resample has the first twice, the second twice, or both.
    values, clusters = np.array([1.0, 1, 1, 0]), ["a", "a", "a", "b"]
    assert mean_interval(values, clusters) == (0, 1)
    assert mean_interval(values, clusters, level=0.4) == (0.75, 0.75)


def test_level_seed_and_pieces():
    values = np.random.default_rng(3).random(5000)
    narrow, wide = mean_interval(values, level=0.5), mean_interval(values, level=0.99)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)
    assert mean_interval(np.ones(3)) == (1, 1)
