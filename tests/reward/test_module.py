"""RewardModule's steps on batches: rewards, margins, remedies and losses; settings."""

import math

import pytest
import torch

from rotopo.data.batch import Role, collate
from rotopo.errors import InputError
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig
from rotopo.reward import RewardModule
from tests.models.families import make_scorer
from tests.models.test_scorer import LAYOUTS, PAD, lora, some_rows


def module_of(**settings) -> RewardModule:
    torch.manual_seed(1)
    module = RewardModule(**settings)
    module.scorer = Scorer.build(make_scorer("llama"), BackboneConfig(adapter=lora()))
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_mean_over_its_pairs_whatever_the_batches(layout):
    module = module_of(margin=0.25, centering=0.1, l2=0.01)
    rows = some_rows()
    whole = module.training_step(collate(rows, PAD, layout, 1 / 5), 0)
    parts = [module.training_step(collate(p, PAD, layout, 1 / 5), 0) for p in (rows[:2], rows[2:])]
    total = sum(part["loss"] for part in parts)
    torch.testing.assert_close(total, whole["loss"], rtol=1e-10, atol=0)
    pairs = whole["pairs"]
    chosen, rejected = pairs.chosen, pairs.rejected
    assert pairs.is_pair.all()
    h = chosen - rejected - 0.25
    expected = (
        torch.log1p(torch.exp(-h))
        + 0.1 * (chosen + rejected).square()
        + 0.01 * (chosen.square() + rejected.square())
    )
    torch.testing.assert_close(pairs.losses, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole["loss"], expected.mean(), rtol=1e-10, atol=1e-12)


def test_swapping_the_responses_swaps_their_rewards():
    module, rows = module_of(), some_rows()
    before = module.test_step(collate(rows, PAD, "packed", 1), 0)["pairs"]
    for row in rows:
        row.roles[:] = [Role.REJECTED, Role.CHOSEN]
    after = module.test_step(collate(rows, PAD, "packed", 1), 0)["pairs"]
    torch.testing.assert_close(after.chosen, before.rejected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.rejected, before.chosen, rtol=1e-12, atol=1e-12)


def test_margins_of_the_data_are_added():
    rows = some_rows()
    plain, shifted = module_of(), module_of(margin=1.0)
    pairs = plain.test_step(collate(rows, PAD, "packed", 1), 0)["pairs"]
    from dataclasses import replace

    rows = [replace(row, margin=0.5 * row.row) for row in rows]
    losses = shifted.test_step(collate(rows, PAD, "packed", 1), 0)["pairs"].losses
    h = pairs.chosen - pairs.rejected - 1 - 0.5 * torch.arange(5)
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-h)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_length_remedies_count_the_responses_own_tokens(layout):
    rows = some_rows()
    batch = collate(rows, PAD, layout, 1)
    true = [len(response) - 1 for row in rows for response in row.responses]
    plain = module_of()
    assert plain.response_lengths(batch).tolist() == true
    head = plain.response_rewards(batch)
    remedied = module_of(length_alpha=4.0, length_penalty=0.1, length_target=6.0)
    lengths = torch.tensor(true, dtype=torch.float64)
    expected = head / (4 + lengths) - 0.1 * (lengths - 6).abs()
    torch.testing.assert_close(remedied.response_rewards(batch), expected, rtol=1e-10, atol=1e-12)


def test_predictions_are_the_rewards_of_single_responses():
    from dataclasses import replace

    module, rows = module_of(length_alpha=3.0), some_rows()
    expected = module.response_rewards(collate(rows, PAD, "packed", 1)).tolist()
    single = [
        replace(row, responses=[response], roles=[Role.CHOSEN])
        for row in rows
        for response in row.responses
    ]
    found = module.predict_step(collate(single, PAD, "padded", 1), 0)
    assert [line["score"] for line in found] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "name", ["margin", "centering", "l2", "length_alpha", "length_penalty", "length_target"]
)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=rf"^{name} is "):
        RewardModule(**{name: value})


def test_a_target_without_a_penalty_is_refused():
    with pytest.raises(InputError, match="length_target is 9"):
        RewardModule(length_target=9)
