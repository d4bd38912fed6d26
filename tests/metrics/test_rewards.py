"""Metrics of rewards against scikit-learn, scipy and torchmetrics, over batches and ranks."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import distributed
from torchmetrics.functional.classification import binary_calibration_error

from rotopo.errors import InputError
from rotopo.metrics.rewardbench import SECTIONS
from rotopo.metrics.rewards import RewardMetrics, ScoredPairs, reward_metrics


def some_pairs(n: int, seed: int = 0, digits: int = 12) -> ScoredPairs:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 40, size=(2, n))
    scores = (generator.normal(size=(2, n)) + 0.02 * tokens + [[0.5], [0]]).round(digits)
    return ScoredPairs(np.arange(n) * 3, *scores, *tokens)


@pytest.mark.parametrize("digits", [12, 1, 0])  # few digits: many ties
def test_against_other_libraries(digits):
    pairs = some_pairs(400, digits=digits)
    found = reward_metrics(pairs)
    rewards = np.concatenate([pairs.chosen, pairs.rejected])
    tokens = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
    labels = np.repeat([1, 0], 400)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, rewards), abs=1e-12)
    for name, theirs in (
        ("length_correlation", stats.pearsonr),
        ("length_rank_correlation", stats.spearmanr),
    ):
        assert found[name] == pytest.approx(theirs(rewards, tokens).statistic, abs=1e-12)
    assert found["reward_mean"] == pytest.approx(rewards.mean())
    assert found["reward_std"] == pytest.approx(float(torch.tensor(rewards).std()))
    assert found["chosen_mean"] - found["rejected_mean"] == pytest.approx(
        (pairs.chosen - pairs.rejected).mean()
    )


def test_calibration_against_torchmetrics():
    pairs = some_pairs(1000)
    margin = torch.tensor(pairs.chosen - pairs.rejected)
    # 30 bins from 0 to 1, of which confidences fill the upper 15.
    theirs = binary_calibration_error(margin.abs().sigmoid(), (margin > 0).int(), n_bins=30)
    assert reward_metrics(pairs)["ece"] == pytest.approx(float(theirs), abs=1e-6)


def test_calibration_by_hand():
    # Confidence 0.8 in four pairs, of which three are right; two ties at one half, which is right.
    margin = np.log(4) * np.array([1, 1, 1, -1, 0, 0])
    one = np.ones(6, dtype=int)
    pairs = ScoredPairs(np.arange(6), margin, np.zeros(6), one, one)
    assert reward_metrics(pairs)["ece"] == pytest.approx(4 / 6 * 0.05)


def test_rewards_that_are_sure_and_right_are_calibrated_and_do_not_overflow():
    one = np.ones(3, dtype=int)
    sure = ScoredPairs(np.arange(3), np.full(3, 1e4), np.full(3, -1e4), one, one)
    assert reward_metrics(sure)["ece"] == 0
    assert reward_metrics(sure)["auroc"] == 1
    wrong = ScoredPairs(np.arange(3), sure.rejected, sure.chosen, one, one)
    assert reward_metrics(wrong)["ece"] == 1
    assert reward_metrics(wrong)["auroc"] == 0


def test_accuracy_counts_a_tie_as_wrong():
    pairs = ScoredPairs(
        np.arange(4), np.array([2.0, 0, 1, 3]), np.array([1.0, 1, 1, 2]), *np.ones((2, 4), int)
    )
    found = reward_metrics(pairs)
    assert found["accuracy"] == 0.5
    assert found["ties"] == 1
    low, high = found["accuracy_interval"]
    assert 0 <= low < 0.5 < high <= 1


def test_matched_lengths_differ_by_a_tenth_of_the_longer():
    chosen_tokens, rejected_tokens = np.array([10, 11, 9, 90, 5]), np.array([10, 10, 10, 100, 6])
    right = np.array([1.0, -1, 1, -1, 1])
    pairs = ScoredPairs(np.arange(5), right, np.zeros(5), chosen_tokens, rejected_tokens)
    found = reward_metrics(pairs)
    assert found["length_matched_pairs"] == 4
    assert found["length_matched_accuracy"] == 0.5


def test_what_is_undefined_is_none():
    pairs = ScoredPairs(np.arange(2), np.ones(2), np.zeros(2), np.full(2, 5), np.full(2, 5))
    found = reward_metrics(pairs)
    assert found["length_correlation"] is found["length_rank_correlation"] is None
    far = ScoredPairs(np.arange(2), np.ones(2), np.zeros(2), np.full(2, 5), np.full(2, 9))
    assert reward_metrics(far)["length_matched_accuracy"] is None
    assert reward_metrics(far)["length_matched_pairs"] == 0


def test_groups_add_up_and_sections_are_rewardbenchs():
    pairs = some_pairs(300)
    groups = {row: f"g{row % 4}" for row in pairs.rows.tolist()}
    found = reward_metrics(pairs, groups)
    by_group = found["groups"].values()
    assert sum(g["pairs"] for g in by_group) == 300
    assert sum(g["pairs"] * g["accuracy"] for g in by_group) / 300 == pytest.approx(
        found["accuracy"]
    )
    assert "sections" not in found
    subsets = [subset for section in SECTIONS.values() for subset in section]
    benchmark = {row: subsets[i % len(subsets)] for i, row in enumerate(pairs.rows.tolist())}
    assert set(reward_metrics(pairs, benchmark)["sections"]) == {*SECTIONS, "overall"}


def test_clusters_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    pairs = ScoredPairs(np.arange(200), values, np.zeros(200), *np.ones((2, 200), int))
    alone = reward_metrics(pairs)["accuracy_interval"]
    within = reward_metrics(pairs, clusters={row: row // 10 for row in range(200)})
    low, high = within["accuracy_interval"]
    assert high - low > 2 * (alone[1] - alone[0])


def test_rewards_that_are_not_finite_are_refused():
    pairs = some_pairs(5)
    pairs.rejected[2] = np.nan
    with pytest.raises(InputError, match=r"1 of 5 .*row 6"):
        reward_metrics(pairs)


def columns(pairs: ScoredPairs, places: list[int]) -> list[torch.Tensor]:
    return [
        torch.tensor(values[places])
        for values in (
            pairs.rows,
            pairs.chosen,
            pairs.rejected,
            pairs.chosen_tokens,
            pairs.rejected_tokens,
        )
    ]


@settings(max_examples=30)
@given(st.data())
def test_neither_batches_nor_order_count(data):
    pairs = some_pairs(23)
    order = data.draw(st.permutations(range(23)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 23), max_size=5)))
    groups = {row: "even" if row % 2 == 0 else "odd" for row in pairs.rows.tolist()}
    metric = RewardMetrics(groups)
    for start, end in zip([0, *cuts], [*cuts, 23], strict=True):
        metric.update(*columns(pairs, order[start:end]))
    assert metric.compute() == reward_metrics(pairs, groups)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_half_precision_rewards_and_no_pairs():
    metric = RewardMetrics()
    assert metric.compute() == {}
    metric.reset()
    rows, chosen, rejected, *tokens = columns(some_pairs(9), list(range(9)))
    metric.update(rows, chosen.bfloat16(), rejected.bfloat16(), *tokens)
    expected = float(chosen.bfloat16().double().mean())
    assert metric.compute()["chosen_mean"] == pytest.approx(expected, abs=1e-12)


SHARES = {"uneven": (list(range(0, 40, 2)), [1, 3, 5]), "one empty": (list(range(23)), [])}


def _on_a_rank(rank: int, file: str, share: str, results) -> None:
    distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    pairs = some_pairs(40)
    metric = RewardMetrics()
    places = SHARES[share][rank]
    for start in range(0, len(places), 6):
        metric.update(*columns(pairs, places[start : start + 6]))
    with metric.sync_context():
        rows = metric.pairs().rows.tolist()
    results.put((metric.compute(), rows, len(metric.pairs().rows)))
    distributed.destroy_process_group()


@pytest.mark.parametrize("share", SHARES)
def test_two_ranks_with_uneven_shares(tmp_path: Path, share):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_on_a_rank, args=(rank, str(tmp_path / "store"), share, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    places = sorted(place for own in SHARES[share] for place in own)
    whole = some_pairs(40)
    expected = reward_metrics(ScoredPairs(*(column.numpy() for column in columns(whole, places))))
    for values, rows, _ in found:
        assert values == expected
        assert rows == whole.rows[places].tolist()
    assert sorted(own for *_, own in found) == sorted(map(len, SHARES[share]))
