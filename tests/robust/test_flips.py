"""Margins against flips."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from rotopo.robust.flips import FlipDetection, flip_detection


def test_against_scikit_learn_with_ties():
    generator = np.random.default_rng(0)
    margins = generator.normal(size=300).round(1)
    flipped = generator.random(300) < 0.3
    found = flip_detection(margins, flipped)
    assert found["auroc"] == pytest.approx(roc_auc_score(flipped, -margins), abs=1e-12)


def test_by_hand():
    margins = np.array([-2.0, 3.0, -1.0, 0.5, 4.0])
    flipped = np.array([True, False, False, True, False])
    found = flip_detection(margins, flipped, rho=0.2)
    # One of the two lowest margins is a flip, the lowest one is; one of the two is above zero.
    assert found == {"auroc": 5 / 6, "recall": 0.5, "fitted": 0.5, "precision": 1.0}
    assert "precision" not in flip_detection(margins, flipped, rho=0.0)


@pytest.mark.parametrize("flipped", [np.zeros(3, bool), np.ones(3, bool)])
def test_without_flips_there_is_nothing_to_find(flipped):
    assert flip_detection(np.arange(3.0), flipped) == {}


def test_the_metric_counts_a_pair_once_in_any_division():
    margins = torch.tensor([-2.0, 3.0, -1.0, 0.5, 4.0])
    flipped = torch.tensor([True, False, False, True, False])
    places = torch.tensor([10, 11, 12, 13, 14])
    metric = FlipDetection()
    for part in (slice(0, 2), slice(1, 5), slice(4, 5)):
        metric.update(places[part], margins[part], flipped[part])
    assert metric.compute() == flip_detection(margins.numpy(), flipped.numpy())
    metric.reset()
    assert metric.compute() == {}
