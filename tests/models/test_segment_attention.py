"""The attention of a block by its definition: shared key heads, values of another size."""

import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.errors import InputError
from rotopo.models import segment_attention as module
from rotopo.models import segments
from rotopo.models.attention import dense_mask
from rotopo.models.segments import segment_mask, segments_of

H, H_KV, D = 6, 2, 4
ROWS = [
    TokenizedRow([5, 6, 7], [[8, 9, 8, 2], [9, 2]], [Role.CHOSEN, Role.REJECTED], 0),
    TokenizedRow([5, 6], [[8, 2], [9, 9, 2]], [Role.CHOSEN, Role.REJECTED], 1),
]


@pytest.mark.parametrize("layout", ["shared_prompt", "packed"])
@pytest.mark.parametrize("kept_scores", [0, 512 * 512])
@pytest.mark.parametrize("d_v", [2, 4, 7])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("followed", [False, True])
def test_blocks_are_masked_attention(layout, kept_scores, d_v, scaling, followed, monkeypatch):
    """As the operator, and followed by torch's autograd."""
    monkeypatch.setattr(segments, "_KEPT_SCORES", kept_scores)
    monkeypatch.setattr(module, "_TILE", 2)
    monkeypatch.setattr(module, "_followed_is_better", lambda *_: followed)
    batch = collate(ROWS, 0, layout, 1.0)
    R, T = batch.input_ids.shape
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(R, heads, T, size, dtype=torch.float64, requires_grad=True)
        for heads, size in ((H, D), (H_KV, D), (H_KV, d_v))
    )
    attention = nn.Module()
    attention.num_key_value_groups = H // H_KV
    mask = segment_mask(batch, torch.float64, None)
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


@pytest.mark.slow
def test_one_graph_serves_batches_of_any_shape():
    """Traced as far as torch needs no C++ compiler; the gradients' shapes and strides are checked
    against what the operator told it."""
    attention = nn.Module()
    attention.num_key_value_groups = H // H_KV

    def attend(query, key, value, mask):
        return module.segment_attention(attention, 2 * query, key, value, mask)[0].cos()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attend, backend="aot_eager", dynamic=True, fullgraph=True)
    for n in (2, 1, 3, 5):
        batch = collate([*ROWS, *ROWS, *ROWS][:n], 0, "packed", 1.0)
        mask = segment_mask(batch, torch.float64, None)
        T = batch.input_ids.shape[1]
        inputs = [
            torch.randn(1, T, heads, size, dtype=torch.float64).transpose(1, 2).requires_grad_()
            for heads, size in ((H, D), (H_KV, D), (H_KV, 3))
        ]
        found, expected = (function(*inputs, mask) for function in (compiled, attend))
        grads = [torch.autograd.grad(x.sum(), inputs) for x in (found, expected)]
        torch.testing.assert_close((found, *grads[0]), (expected, *grads[1]))
    assert counters["stats"]["unique_graphs"] == 1


def test_weights_are_kept_only_if_asked_for():
    batch = collate(ROWS, 0, "packed", 1.0)
    mask = segment_mask(batch, torch.float32, None)
    inputs = [torch.randn(1, H, batch.input_ids.shape[1], D) for _ in range(3)]
    for keep in (True, False):
        assert len(module._forward(*inputs, mask, 0.5, keep)[1]) == keep * H * len(mask)


def test_autocast_reaches_the_operator():
    batch = collate(ROWS, 0, "packed", 1.0)
    mask = segment_mask(batch, torch.float32, None)
    inputs = [torch.randn(1, H, batch.input_ids.shape[1], D) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = module._operator(*inputs, mask, 0.5)
        expected = module._followed(*inputs, mask, 0.0, 0.5)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_blocks_outlive_the_tensor_that_brought_them():
    """Checkpointing and compiled graphs pass on another tensor on the same memory; and a copy of
    it, for which no blocks are known, is refused by either way."""
    batch = collate(ROWS, 0, "packed", 1.0)
    inputs = [torch.randn(1, H, batch.input_ids.shape[1], D) for _ in range(3)]
    mask = segment_mask(batch, torch.float32, None).detach()
    expected = module._followed(*inputs, mask, 0.0, 0.5)
    torch.testing.assert_close(module._operator(*inputs, mask, 0.5), expected)
    for attend in (module._operator, lambda *x: module._followed(*x[:4], 0.0, x[4])):
        with pytest.raises(InputError, match="changes the mask"):
            attend(*inputs, mask.clone(), 0.5)


def test_blocks_go_with_the_last_tensor_on_their_memory():
    """A graph may be the last to hold it, with none in Python."""
    mask = segment_mask(collate(ROWS, 0, "packed", 1.0), torch.float32, None)
    blocks = weakref.ref(segments_of(mask))
    T = segments_of(mask).shape[1]
    inputs = [torch.randn(1, H, T, D, requires_grad=True) for _ in range(3)]
    output = module._operator(*inputs, mask.detach(), 0.5)
    del mask
    assert blocks() is not None
    output.sum().backward()
    del output
    assert blocks() is None
