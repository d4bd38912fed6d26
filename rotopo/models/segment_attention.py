"""Attention over lines that several responses share, one block per group of segments.

In a line ``prompt | response 1 | response 2 | prompt | ...`` most of the T × T scores are masked: a
response sees its prompt and itself only. Here the queries of each segment meet just the keys that
they may see. Registered with transformers as the attention implementation ``segments``; without
a mask of :func:`segment_mask`'s (generation, padded batches) it is transformers' ``sdpa``.

It is one operator with a backward pass of its own, ``rotopo::segments``, by which a compiled layer
stays a single graph whatever the number of blocks. Within a block heads come before tokens, and
query heads that share a key head lie side by side: their products with it are one of two matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotopo.errors import InputError
from rotopo.models.segments import Sums, segments_of

# Queries at a time whose weights the backward pass makes again: few enough for these to stay in a
# processor's cache [ours].
_TILE = 128


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [R, H, T, d], key [R, H_kv, T, d], value
    [R, H_kv, T, d_v]; in multi-head latent attention d_v is not d.

    Returns:
        the output [R, T, H, d_v], and no weights.

    Raises:
        InputError: the family does more with its scores than scaling and masking.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise InputError(
            f"attention: {type(module).__name__} caps its scores or has sinks; set "
            "'eager', and data.layout to 'shared_prompt'."
        )
    # An empty mask of any other kind masks nothing that there is.
    if attention_mask is None or attention_mask.numel() > 0:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout or _followed_is_better(query, attention_mask):
        return _followed(query, key, value, attention_mask, dropout, scaling), None
    return _operator(query, key, value, attention_mask, scaling), None


def _followed_is_better(query: Tensor, carrier: Tensor) -> bool:
    """Whether the backward pass too is to be the fused kernel's: on a GPU, for large blocks, where
    a compiler does not ask for one operator."""
    if torch.compiler.is_compiling() or not query.is_cuda:
        return False
    return not all(block.is_kept for block in segments_of(carrier).blocks)


@torch.compiler.disable(reason="blocks that the compiler does not see")
def _followed(
    query: Tensor, key: Tensor, value: Tensor, carrier: Tensor, dropout: float, scaling: float
) -> Tensor:
    """The same in the device's fused kernel, for torch's autograd to follow."""
    segments = segments_of(carrier)
    there, back = segments.moves("queries", query.shape[1])
    q = _Moved.apply(_rows(query), there, back)
    k, v = (_Moved.apply(_rows(x), *segments.moves("keys", x.shape[1])) for x in (key, value))
    outputs = []
    for block, (of_q,), (of_k, of_v) in segments.by_block((q,), (k, v)):
        output = _fused(of_q, of_k, of_v, block.mask.to(q.dtype), dropout, scaling)
        outputs.append(output.flatten(0, 2))
    found = _Moved.apply(torch.cat(outputs), back, there)
    return found.view(*segments.shape, query.shape[1], -1)


class _Moved(torch.autograd.Function):
    """Rows to other places, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Sums, back: Sums) -> Tensor:
        ctx.back = back
        return there.of(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back.of(grad), None, None


def _rows(x: Tensor) -> Tensor:
    """[R, heads, T, d] -> [R·T·heads, d]"""
    return x.transpose(1, 2).reshape(-1, x.shape[-1])


def _by_key_head(x: Tensor, H_kv: int) -> Tensor:
    """[G, H, Q, d] -> [G·H_kv, H/H_kv·Q, d]: query heads that share a key head are one matrix."""
    G, H, Q, d = x.shape
    return x.reshape(G * H_kv, H // H_kv * Q, d)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """The attention of a block in torch's kernel for the device [G, H, Q, d_v]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor, scaling: float, out: Tensor | None = None
) -> Tensor:
    """softmax(scaling · q kᵀ + mask) [G·H_kv, H/H_kv·Q, K].

    Args:
        q: [G, H, Q, d].
        k: [G, H_kv, K, d].
        mask: [G, 1, Q, K].
        scaling: of the scores; within the product, which without it might overflow in float16.
        out: where to, if anywhere.
    """
    H_kv = k.shape[1]
    scores = mask.expand(-1, q.shape[1], -1, -1).clone(memory_format=torch.contiguous_format)
    scores = _by_key_head(scores, H_kv)
    scores.baddbmm_(_by_key_head(q, H_kv), k.flatten(0, 1).mT, alpha=scaling)
    return torch.softmax(scores, -1, out=out)


def _block_weights(kept: Tensor, start: int, mask: Tensor, H: int, H_kv: int) -> Tensor:
    """A block's part of the weights that are kept [G·H_kv, H/H_kv·Q, K], which begins at a place;
    mask: the block's."""
    part = kept[start : start + H * mask.numel()]
    return part.view(len(mask) * H_kv, -1, mask.shape[-1])


def _operator(query: Tensor, key: Tensor, value: Tensor, carrier: Tensor, scaling: float) -> Tensor:
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _forward(query, key, value, carrier, scaling, torch.is_grad_enabled())[0]


@torch.library.custom_op("rotopo::segments", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, carrier: Tensor, scaling: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output [R, T, H, d_v], and the softmax weights that the backward pass is to read [H·W]:
    those of the blocks that keep them, if it is to come at all."""
    segments = segments_of(carrier)
    H = query.shape[1]
    of_queries, of_keys = segments.moves("queries", H), segments.moves("keys", key.shape[1])
    queries = of_queries.there.of(_rows(query))
    keys, values = of_keys.there.of(_rows(key)), of_keys.there.of(_rows(value))
    outputs = values.new_empty(len(queries), values.shape[1])
    kept = queries.new_empty(H * len(carrier) if keep else 0)
    n_kept = 0
    for block, (q, output), (k, v) in segments.by_block((queries, outputs), (keys, values)):
        mask = block.mask.to(q.dtype)
        if not block.is_kept:
            output.copy_(_fused(q, k, v, mask, 0.0, scaling))
            continue
        weights = None
        if keep:
            weights = _block_weights(kept, n_kept, mask, H, k.shape[1])
            n_kept += weights.numel()
        weights = _weights(q, k, mask, scaling, weights)
        torch.bmm(weights, v.flatten(0, 1), out=_by_key_head(output, v.shape[1]))
    return of_queries.back.of(outputs).view(*segments.shape, H, -1), kept


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, carrier: Tensor, scaling: float, keep: bool
) -> tuple[Tensor, Tensor]:
    R, H, T, _ = query.shape
    kept = carrier.shape[0] * H if keep else 0
    return query.new_empty(R, T, H, value.shape[-1]), query.new_empty(kept)


@torch.library.custom_op("rotopo::segments_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    carrier: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each [R, T, heads, d or d_v]."""
    segments = segments_of(carrier)
    H, H_kv = query.shape[1], key.shape[1]
    of_queries, of_keys = segments.moves("queries", H), segments.moves("keys", H_kv)
    grads, queries = (of_queries.there.of(x) for x in (grad.flatten(0, 2), _rows(query)))
    keys, values = of_keys.there.of(_rows(key)), of_keys.there.of(_rows(value))
    found = [torch.empty_like(x) for x in (queries, keys, values)]
    n_kept = 0
    for block, (g, q, dq), (k, v, dk, dv) in segments.by_block(
        (grads, queries, found[0]), (keys, values, *found[1:])
    ):
        mask = block.mask.to(g.dtype)
        if block.is_kept:
            weights = _block_weights(kept, n_kept, mask, H, H_kv)
            n_kept += weights.numel()
            _products_backward(g, q, k, v, weights, scaling, (dq, dk, dv))
        else:
            _tiles_backward(g, q, k, v, mask, scaling, (dq, dk, dv))
    backs = of_queries.back, of_keys.back, of_keys.back
    dq, dk, dv = (
        back.of(x).view(*segments.shape, -1, x.shape[-1])
        for back, x in zip(backs, found, strict=True)
    )
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    carrier: Tensor,
    scaling: float,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.transpose(1, 2).shape) for x in (query, key, value))


def _tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    out: Sequence[Tensor],
) -> None:
    """As :func:`_products_backward`, with the weights made again, for a few queries at a time."""
    dq, *of_keys = out
    # Sums over tiles are kept in float32; half types would lose the small terms.
    wide = torch.promote_types(k.dtype, torch.float32)
    totals = [torch.zeros_like(x, dtype=wide) for x in of_keys]
    for start in range(0, q.shape[2], _TILE):
        part = slice(start, start + _TILE)
        some = q[:, :, part].contiguous()
        of_some = torch.empty_like(some)
        weights = _weights(some, k, mask[:, :, part], scaling)
        found = of_some, *of_keys
        _products_backward(grad[:, :, part], some, k, v, weights, scaling, found)
        dq[:, :, part] = of_some
        for total, of_tile in zip(totals, of_keys, strict=True):
            total += of_tile
    for x, total in zip(of_keys, totals, strict=True):
        x.copy_(total)


def _products_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    scaling: float,
    out: Sequence[Tensor],
) -> None:
    """Gradients of a block's q, k and v, by the one of its output [G, H, Q, d_v].

    Args:
        grad: that one.
        q: [G, H, Q, d].
        k: [G, H_kv, K, d].
        v: [G, H_kv, K, d_v].
        weights: of the softmax [G·H_kv, H/H_kv·Q, K].
        scaling: of the scores.
        out: where the gradients are written, which lie in one piece.
    """
    H_kv = k.shape[1]
    grad, q, dq = (_by_key_head(x, H_kv) for x in (grad, q, out[0]))
    k, v, dk, dv = (x.flatten(0, 1) for x in (k, v, *out[1:]))
    of_weights = grad @ v.mT
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    torch.baddbmm(dq, of_scores, k, beta=0, alpha=scaling, out=dq)
    torch.baddbmm(dk, of_scores.mT, q, beta=0, alpha=scaling, out=dk)
    torch.bmm(weights.mT, grad, out=dv)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, carrier, ctx.scaling, _ = inputs
    ctx.save_for_backward(query, key, value, output[1], carrier)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the weights, a whole pass over memory


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = _backward(grad, *ctx.saved_tensors, ctx.scaling)
    return *(x.transpose(1, 2) for x in found), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)

ALL_ATTENTION_FUNCTIONS.register("segments", segment_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("segments", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
