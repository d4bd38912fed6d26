"""Attention over shared-prompt lines, one block per segment rather than one mask per line.

In a line ``prompt | response 1 | response 2`` most of the T × T scores are masked: a response sees
the prompt and itself only. Here the queries of each segment meet just the keys that they may see.
Registered with transformers as the attention implementation ``segments``; without the blocks that
:func:`with_segments` hangs on a mask (generation, padded batches) it is transformers' ``sdpa``.
"""

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

# Blocks of up to this many scores a head are plain matrix products: what a fused kernel saves in
# memory is small there, and its backward pass is the slower one.
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


def with_segments(mask: Tensor, batch: PairBatch) -> Tensor:
    """The additive mask [R, 1, T, T] of a shared-prompt batch, with its blocks on it."""
    R, T = batch.input_ids.shape
    device = mask.device
    prompts = (batch.segment_ids == 0).sum(1)
    inputs = batch.lengths - 1  # the last token of a response is no input
    ends = inputs.cumsum(0)
    # A response begins behind its prompt and the responses before it on its line.
    before = ends - inputs
    first = torch.searchsorted(batch.pairs, torch.arange(R, device=device))
    starts = prompts[batch.pairs] + before - before[first[batch.pairs]]

    P, C = int(prompts.max()), int(inputs.max())
    prompt_columns, prompt_valid = _columns(torch.zeros_like(prompts), prompts, P, T)
    lines = torch.arange(R, device=device)
    groups = [(lines, prompt_columns, prompt_valid, prompt_columns, prompt_valid)]
    if C > 0:
        columns, valid = _columns(starts, inputs, C, T)
        key_columns = torch.cat([prompt_columns[batch.pairs], columns], 1)
        key_valid = torch.cat([prompt_valid[batch.pairs], valid], 1)
        groups.append((batch.pairs, columns, valid, key_columns, key_valid))

    blocks, targets = [], []
    for line, columns, valid, key_columns, key_valid in groups:
        visible = mask[line[:, None, None], 0, columns[:, :, None], key_columns[:, None, :]]
        visible = visible.masked_fill(~key_valid[:, None, :], torch.finfo(mask.dtype).min)
        at = T * line[:, None]
        blocks.append(Block(at + columns, at + key_columns, visible[:, None]))
        targets.append(torch.where(valid, at + columns, R * T).flatten())
    target = torch.cat(targets)
    # Fill-up goes to a slot of its own, and padding takes the output of whatever comes first.
    source = torch.zeros(R * T + 1, dtype=torch.long, device=device)
    source.scatter_(0, target, torch.arange(len(target), device=device))
    mask.segments = Segments(blocks, source[: R * T])  # type: ignore[attr-defined]
    return mask


def _columns(starts: Tensor, lengths: Tensor, longest: int, T: int) -> tuple[Tensor, Tensor]:
    """Columns of segments filled up to the longest [G, longest], and which are real."""
    steps = torch.arange(longest, device=starts.device)
    valid = steps < lengths[:, None]
    return (starts[:, None] + torch.where(valid, steps, 0)).clamp(max=T - 1), valid


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
    """transformers' attention interface: query [R, H, T, d], key and value [R, H_kv, T, d].

    Returns:
        the output [R, T, H, d], and no weights.

    Raises:
        InputError: the family does more with its scores than scaling and masking.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise InputError(
            f"policy.attention: {type(module).__name__} caps its scores or has sinks; set 'eager'."
        )
    segments: Segments | None = getattr(attention_mask, "segments", None)
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    R, H, T, d = query.shape
    scaling = d**-0.5 if scaling is None else scaling
    flat = [x.transpose(1, 2).reshape(R * T, -1, d) for x in (query, key, value)]
    outputs = []
    for block in segments.blocks:
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape)
            for x, index in zip(flat, (block.queries, block.keys, block.keys), strict=True)
        )
        Q, K = block.mask.shape[2:]
        if Q * K <= _PLAIN_SCORES:
            output = _products(q, k, v, block.mask, dropout, scaling)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            output, _ = sdpa_attention_forward(
                module, q, k, v, block.mask, dropout=dropout, scaling=scaling, **kwargs
            )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, segments.source).view(R, T, H, d), None


def _products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float
) -> Tensor:
    """softmax(scaling · q kᵀ + mask) v in plain products; q [G, Q, H, d] → [G, Q, H, d]."""
    G, Q, H, d = q.shape
    K, H_kv = k.shape[1:3]
    # The query heads that share a key head lie side by side, so that no key is repeated.
    shared = q.view(G, Q, H_kv, H // H_kv, d).permute(0, 2, 3, 1, 4).reshape(G, H_kv, -1, d)
    scores = (shared @ k.permute(0, 2, 3, 1)).view(G, H_kv, H // H_kv, Q, K)
    scores = torch.add(mask[:, None], scores, alpha=scaling)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=wide).to(q.dtype), dropout)
    output = weights.view(G, H_kv, -1, K) @ v.transpose(1, 2)
    return output.view(G, H_kv, H // H_kv, Q, d).permute(0, 3, 1, 2, 4).reshape(G, Q, H, d)


ALL_ATTENTION_FUNCTIONS.register("segments", segment_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("segments", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
