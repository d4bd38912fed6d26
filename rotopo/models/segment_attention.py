"""Attention over lines that several responses share, one block per group of segments.

In a line ``prompt | response 1 | response 2 | prompt | ...`` most of the T × T scores are masked: a
response sees its prompt and itself only. Here the queries of each segment meet just the keys that
they may see. Registered with transformers as the attention implementation ``segments``; without
the blocks that :func:`segment_mask` hangs on a mask (generation, padded batches) it is
transformers' ``sdpa``.
"""

import math
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Segments:
    """The blocks of a batch, and where in their outputs, end to end, each token's is [R·T]."""

    blocks: list[Block]
    source: Tensor


def segment_mask(batch: PairBatch, dtype: torch.dtype, window: int | None) -> Tensor:
    """An empty mask [1, 1, 0, 0] for transformers to pass on, with the batch's blocks on it.

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
    # Not of a floating-point type: FSDP casts those, and what hangs on them is lost.
    carrier = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=positions.device)
    carrier.segments = Segments(blocks, source[:-1])  # type: ignore[attr-defined]
    return carrier


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
    segments: Segments | None = getattr(attention_mask, "segments", None)
    if segments is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise InputError(
                "attention: the model or the strategy changes the mask on its way to "
                "'segments'; set data.layout to 'padded'."
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    R, _, T, d = query.shape
    scaling = d**-0.5 if scaling is None else scaling
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    outputs = []
    for block in segments.blocks:
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape)
            for x, index in zip(flat, (block.queries, block.keys, block.keys), strict=True)
        )
        mask = block.mask.to(q.dtype)
        Q, K = mask.shape[2:]
        if Q * K <= _PLAIN_SCORES:
            output = _products(q, k, v, mask, dropout, scaling)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            output, _ = sdpa_attention_forward(
                module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs
            )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, segments.source).unflatten(0, (R, T)), None


def _products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float
) -> Tensor:
    """softmax(scaling · q kᵀ + mask) v in plain products; [G, Q, H, d_v].

    Args:
        q: [G, Q, H, d].
        k: [G, K, H_kv, d].
        v: [G, K, H_kv, d_v].
        mask: [G, 1, Q, K].
        dropout: of the weights.
        scaling: of the scores.
    """
    G, Q, H, d = q.shape
    K, H_kv = k.shape[1:3]
    # The query heads that share a key head lie side by side, so that no key is repeated.
    # In float16 unscaled products overflow; a power of two scales without rounding.
    power = 2.0 ** math.floor(math.log2(scaling))
    shared = (
        (q * power).view(G, Q, H_kv, H // H_kv, d).permute(0, 2, 3, 1, 4).reshape(G, H_kv, -1, d)
    )
    scores = (shared @ k.permute(0, 2, 3, 1)).view(G, H_kv, H // H_kv, Q, K)
    scores = torch.add(mask[:, None], scores, alpha=scaling / power)
    # In a half type torch's softmax computes in float32 and rounds its result, which is all that
    # its backward pass then needs to keep.
    weights = F.dropout(scores.softmax(-1), dropout)
    output = weights.view(G, H_kv, -1, K) @ v.transpose(1, 2)
    return output.view(G, H_kv, H // H_kv, Q, -1).permute(0, 3, 1, 2, 4).reshape(G, Q, H, -1)


ALL_ATTENTION_FUNCTIONS.register("segments", segment_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("segments", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
