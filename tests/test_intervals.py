import pytest

from rotopo.intervals import wilson_interval


def test_wilsons_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 4), (3, 7), (50, 50), (180, 300)):
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson_interval(right / n, n) == pytest.approx(
            (expected.low, expected.high), abs=1e-6
        )
