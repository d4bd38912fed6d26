"""Attention over lines that several responses share, one block per group of segments.

In a line ``prompt | response 1 | response 2 | prompt | ...`` most of the T × T scores are masked: a
response sees its prompt and itself only. Here the queries of each segment meet just the keys that
they may see. Registered with transformers as the attention implementation ``segments``; without
a mask of :func:`segment_mask`'s (generation, padded batches) it is transformers' ``sdpa``.

In a compiled layer the same computation is one operator, ``rotopo::segments``, by which the layer
stays a single graph whatever the number of blocks. Uncompiled, torch's autograd follows it: of the
fused kernel it keeps what its backward pass needs, in the form that the device's kernel has it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotopo.data.batch import PairBatch
from rotopo.errors import InputError

# Blocks of up to this many scores a head are plain matrix products, which keep their weights for
# the backward pass: a fused kernel's, which makes them again, is the slower one there on a CPU.
_PLAIN_SCORES = 512 * 512
# Queries at a time for which a compiled layer's backward pass makes the weights of larger ones
# again: few enough to stay in a processor's cache [ours].
_TILE = 64


@dataclass(frozen=True)
class Block:
    """G groups of Q queries with the K keys that they may see.

    Attributes:
        queries: flat index into the R·T tokens of the lines [G, Q].
        keys: the same for the keys [G, K].
        mask: additive [G, 1, Q, K].
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor

    @property
    def is_plain(self) -> bool:
        return self.mask.shape[2] * self.mask.shape[3] <= _PLAIN_SCORES


@dataclass(frozen=True)
class Segments:
    """The blocks of a batch, and where in their outputs, end to end, each token's is [R·T]."""

    blocks: list[Block]
    source: Tensor


# By the memory of the mask that stands for them, with which they go. Not by the mask itself, which
# checkpointing and compiled graphs replace by other tensors on the same memory.
_SEGMENTS: WeakKeyDictionary[torch.UntypedStorage, Segments] = WeakKeyDictionary()


def segment_mask(batch: PairBatch, dtype: torch.dtype, window: int | None) -> Tensor:
    """An empty mask [W, 1, 0, 0] for transformers to pass on, which stands for the batch's blocks.

    W says how many scores a head has in plain blocks, by which the compiler knows how much
    :func:`_forward` keeps.

    Args:
        batch: R lines of T tokens, in a layout with blocks.
        dtype: dtype of the attention scores.
        window: how far back a query sees, itself included; None for all the way.
    """
    positions = batch.position_ids.flatten()
    blocks, targets = [], []
    for block in batch.blocks:
        queries, keys = block.queries.clamp(min=0), block.keys.clamp(min=0)
        distance = positions[queries][:, :, None] - positions[keys][:, None, :]
        hidden = (distance < 0) | (block.keys < 0)[:, None, :]
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        blocks.append(Block(queries, keys, mask[:, None]))
        targets.append(torch.where(block.queries < 0, len(positions), queries).flatten())
    target = torch.cat(targets)
    # Fill-up goes to a slot of its own, and padding takes the output of whatever comes first.
    source = torch.zeros(len(positions) + 1, dtype=torch.long, device=positions.device)
    source.scatter_(0, target, torch.arange(len(target), device=positions.device))
    kept = sum(block.mask.numel() for block in blocks if block.is_plain)
    # Not of a floating-point type: FSDP casts those to others on another memory.
    carrier = torch.empty(kept, 1, 0, 0, dtype=torch.bool, device=positions.device)
    _SEGMENTS[carrier.untyped_storage()] = Segments(blocks, source[:-1])
    return carrier


def _segments_of(carrier: Tensor) -> Segments:
    segments = _SEGMENTS.get(carrier.untyped_storage())
    if segments is None:
        raise InputError(
            "attention: the model or the strategy changes the mask on its way to 'segments'; set "
            "data.layout to 'padded'."
        )
    return segments


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
    if torch.compiler.is_compiling() and not dropout:
        return _operator(query, key, value, attention_mask, scaling), None
    return _uncompiled(query, key, value, attention_mask, dropout, scaling), None


@torch.compiler.disable(reason="blocks that the compiler does not see")
def _uncompiled(
    query: Tensor, key: Tensor, value: Tensor, carrier: Tensor, dropout: float, scaling: float
) -> Tensor:
    """As :func:`segment_attention`, for torch's autograd to follow."""
    segments = _segments_of(carrier)
    outputs = []
    for block, q, k, v in _gathered(segments, query, key, value):
        mask = block.mask.to(q.dtype)
        if block.is_plain:
            weights = F.dropout(_weights(q, k, mask, scaling), dropout)
            output = _weighted(weights, v, q.shape)
        else:
            output = _fused(q, k, v, mask, dropout, scaling)
        outputs.append(output.flatten(0, 1))
    return _scattered(outputs, segments, query)


def _gathered(
    segments: Segments, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
    """Each block with its queries [G, Q, H, d], keys [G, K, H_kv, d], values [G, K, H_kv, d_v]."""
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    for block in segments.blocks:
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape)
            for x, index in zip(flat, (block.queries, block.keys, block.keys), strict=True)
        )
        yield block, q, k, v


def _scattered(outputs: list[Tensor], segments: Segments, query: Tensor) -> Tensor:
    """The blocks' outputs, each [G·Q, H, d_v], where their tokens are [R, T, H, d_v]."""
    R, _, T, _ = query.shape
    return torch.cat(outputs).index_select(0, segments.source).unflatten(0, (R, T))


def _by_key_head(q: Tensor, H_kv: int) -> Tensor:
    """[G, Q, H, d] -> [G, H_kv, H/H_kv · Q, d]: the query heads that share a key head lie side by
    side, so that no key is repeated."""
    G, Q, H, d = q.shape
    return q.reshape(G, Q, H_kv, H // H_kv, d).permute(0, 2, 3, 1, 4).reshape(G, H_kv, -1, d)


def _by_query(x: Tensor, shape: torch.Size) -> Tensor:
    """Back from :func:`_by_key_head` to a shape [G, Q, H, any]."""
    G, Q, H, _ = shape
    H_kv = x.shape[1]
    return x.view(G, H_kv, H // H_kv, Q, -1).permute(0, 3, 1, 2, 4).reshape(G, Q, H, -1)


def _power(scaling: float) -> float:
    # In float16 unscaled products overflow; a power of two scales without rounding.
    return 2.0 ** math.floor(math.log2(scaling))


def _weights(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """softmax(scaling · q kᵀ + mask) in plain products [G, H_kv, H/H_kv, Q, K].

    Args:
        q: [G, Q, H, d].
        k: [G, K, H_kv, d].
        mask: [G, 1, Q, K].
        scaling: of the scores.
    """
    (G, Q, H, _), (K, H_kv) = q.shape, k.shape[1:3]
    power = _power(scaling)
    scores = (_by_key_head(q * power, H_kv) @ k.permute(0, 2, 3, 1)).view(G, H_kv, H // H_kv, Q, K)
    # In a half type torch's softmax computes in float32 and rounds its result, which is all that
    # its backward pass then needs to keep.
    return torch.add(mask[:, None], scores, alpha=scaling / power).softmax(-1)


def _weighted(weights: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
    """The values [G, K, H_kv, d_v] by their weights -> [G, Q, H, d_v]; shape: of the queries."""
    return _by_query(weights.flatten(2, 3) @ v.transpose(1, 2), shape)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """The attention of a block in torch's kernel for the device [G, Q, H, d_v]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2)


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
    """As :func:`_uncompiled`, with the softmax weights of all plain blocks [H·W] if they are to be
    kept: in the backward pass they would be slower made again than read."""
    segments = _segments_of(carrier)
    outputs, kept = [], [query.new_empty(0)]
    for block, q, k, v in _gathered(segments, query, key, value):
        mask = block.mask.to(q.dtype)
        if block.is_plain:
            weights = _weights(q, k, mask, scaling)
            output = _weighted(weights, v, q.shape)
            if keep:
                kept.append(weights.flatten())
        else:
            output = _fused(q, k, v, mask, 0.0, scaling)
        outputs.append(output.flatten(0, 1))
    return _scattered(outputs, segments, query), torch.cat(kept)


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
    segments = _segments_of(carrier)
    grads = [torch.zeros_like(x.transpose(1, 2).flatten(0, 1)) for x in (query, key, value)]
    slots = grad.new_zeros(sum(block.queries.numel() for block in segments.blocks), *grad.shape[2:])
    slots.index_add_(0, segments.source, grad.flatten(0, 1))
    of_outputs = slots.split([block.queries.numel() for block in segments.blocks])
    blocks = _gathered(segments, query, key, value)
    for (block, q, k, v), of_output in zip(blocks, of_outputs, strict=True):
        of_output = of_output.unflatten(0, block.queries.shape)
        if block.is_plain:
            size = block.mask.numel() * q.shape[2]
            weights, kept = kept[:size], kept[size:]
            found = _products_backward(of_output, q, k, v, weights, scaling)
        else:
            found = _tiles_backward(of_output, q, k, v, block.mask.to(q.dtype), scaling)
        indices = (block.queries, block.keys, block.keys)
        for total, index, part in zip(grads, indices, found, strict=True):
            total.index_add_(0, index.flatten(), part.flatten(0, 1))
    R, T = grad.shape[:2]
    dq, dk, dv = (total.unflatten(0, (R, T)) for total in grads)
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
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_products_backward`, with the weights made again, for a few queries at a time."""
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[1], _TILE):
        part = slice(start, start + _TILE)
        weights = _weights(q[:, part], k, mask[:, :, part], scaling)
        found = _products_backward(grad[:, part], q[:, part], k, v, weights, scaling)
        dq.append(found[0])
        dk += found[1]
        dv += found[2]
    return torch.cat(dq, 1), dk, dv


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block's q, k and v, given the one of its output [G, Q, H, d_v]."""
    G, K, H_kv, _ = k.shape
    power = _power(scaling)
    weights = weights.view(G, H_kv, -1, K)
    grad = _by_key_head(grad, H_kv)
    of_weights = grad @ v.permute(0, 2, 3, 1)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    dq = _by_query(of_scores @ k.transpose(1, 2), q.shape) * scaling
    dk = (of_scores.mT @ _by_key_head(q * power, H_kv)).transpose(1, 2) * (scaling / power)
    dv = (weights.mT @ grad).transpose(1, 2)
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, carrier, ctx.scaling, _ = inputs
    ctx.save_for_backward(query, key, value, output[1], carrier)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(grad, *ctx.saved_tensors, ctx.scaling)
    return *(x.transpose(1, 2) for x in found), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)

ALL_ATTENTION_FUNCTIONS.register("segments", segment_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("segments", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
