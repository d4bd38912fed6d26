"""The attention of a block by its definition: shared key heads, values of another size."""

import pytest
import torch
from torch import nn

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.models import segment_attention as module
from rotopo.models.attention import dense_mask

H, H_KV, D = 6, 2, 4
ROWS = [
    TokenizedRow([5, 6, 7], [[8, 9, 8, 2], [9, 2]], [Role.CHOSEN, Role.REJECTED], 0),
    TokenizedRow([5, 6], [[8, 2], [9, 9, 2]], [Role.CHOSEN, Role.REJECTED], 1),
]


@pytest.mark.parametrize("layout", ["shared_prompt", "packed"])
@pytest.mark.parametrize("plain_scores", [0, 512 * 512])
@pytest.mark.parametrize("d_v", [2, 4, 7])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_blocks_are_masked_attention(layout, plain_scores, d_v, scaling, monkeypatch):
    monkeypatch.setattr(module, "_PLAIN_SCORES", plain_scores)
    batch = collate(ROWS, 0, layout, 1.0)
    R, T = batch.input_ids.shape
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(R, heads, T, size, dtype=torch.float64, requires_grad=True)
        for heads, size in ((H, D), (H_KV, D), (H_KV, d_v))
    )
    attention = nn.Module()
    attention.num_key_value_groups = H // H_KV
    mask = module.segment_mask(batch, torch.float64, None)
    found, _ = module.segment_attention(attention, query, key, value, mask, scaling=scaling)
    assert found.shape == (R, T, H, d_v)

    seen = dense_mask(batch, torch.float64, None)
    keys, values = (x.repeat_interleave(H // H_KV, dim=1) for x in (key, value))
    scores = (D**-0.5 if scaling is None else scaling) * query @ keys.transpose(2, 3) + seen
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    real = batch.segment_ids >= 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(found[real])
    grads = [
        torch.autograd.grad((factors * x[real]).sum(), (query, key, value))
        for x in (found, expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
