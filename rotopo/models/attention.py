"""What a batch's attention needs beside its tokens, per implementation and per family of models.

The padded layout needs nothing: with padding on the right, a causal model's real tokens never see
it. In the others several responses share a line, and often several rows: positions say where a
token is in its own sequence, and the mask which tokens are of that sequence. A family that slides
a window over the past must get the window in the mask, because transformers takes a mask that is
made already as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig

import rotopo.models.segment_attention  # noqa: F401  registers "segments" with transformers
from rotopo.data.batch import PairBatch
from rotopo.errors import InputError
from rotopo.models.segments import segment_mask

Mask = Tensor | BlockMask
# By the decoder's names; masks of several kinds of layers by the kind.
AttentionInputs = dict[str, Mask | dict[str, Mask]]


def attention_inputs(
    batch: PairBatch, config: PretrainedConfig, dtype: torch.dtype
) -> AttentionInputs:
    """Keyword arguments of the decoder's forward: masks and positions.

    Args:
        batch: R lines of T tokens.
        config: the decoder's configuration.
        dtype: dtype of the attention scores, for additive masks.

    Raises:
        InputError: responses share a line under an attention that cannot keep them apart.
    """
    if batch.layout == "padded":
        return {}
    make = _MASKS.get(config._attn_implementation)
    if make is None:
        raise InputError(
            f"attention {config._attn_implementation!r} takes no mask of its own: "
            f"use {' or '.join(_MASKS)}, or set data.layout to 'padded'."
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(
            f"Layers of type {', '.join(sorted(unknown))} ({config.model_type}) cannot share a "
            "line between responses: set data.layout to 'padded'."
        )
    mask: Mask | dict[str, Mask]
    if "sliding_attention" in kinds:
        assert window is not None
        mask = {
            "full_attention": make(batch, dtype, None),
            "sliding_attention": make(batch, dtype, window),
        }
    else:
        mask = make(batch, dtype, None if kinds else window)
    return {"position_ids": batch.position_ids, "attention_mask": mask}


def row_numbers(batch: PairBatch) -> Tensor:
    """The row (0..B-1) of each token [R, T]: a row begins with the first token of its prompt."""
    begins = (batch.segment_ids == 0) & (batch.position_ids == 0)
    return begins.flatten().cumsum(0).view_as(begins) - 1


def _rule(batch: PairBatch, window: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key, as a function of line, head, query and key, all indices.

    It sees what comes before it of its prompt and of its own response. Padding sees itself, so
    that no row of the softmax is empty.
    """
    rows, segments, positions = row_numbers(batch), batch.segment_ids, batch.position_ids

    def seen(line: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        own = segments[line, query] == segments[line, key]
        shared = (segments[line, key] == 0) & (segments[line, query] > 0)
        together = (rows[line, query] == rows[line, key]) & (own | shared) & (key <= query)
        if window is not None:
            near = positions[line, query] - positions[line, key] < window
            together = together & (near | (segments[line, query] < 0))
        return together

    return seen


def dense_mask(batch: PairBatch, dtype: torch.dtype, window: int | None) -> Tensor:
    """Additive mask [R, 1, T, T]."""
    R, T = batch.segment_ids.shape
    lines, columns = (torch.arange(n, device=batch.segment_ids.device) for n in (R, T))
    seen = _rule(batch, window)(lines[:, None, None], None, columns[:, None], columns)
    additive = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return additive.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def flex_mask(batch: PairBatch, dtype: torch.dtype, window: int | None) -> BlockMask:
    """The blocks of scores that FlexAttention computes.

    Raises:
        InputError: training on a processor, for which torch has no backward pass of it.
    """
    device = batch.segment_ids.device
    if device.type == "cpu" and torch.is_grad_enabled():
        raise InputError(
            "attention 'flex_attention' trains on a GPU only: 'segments' trains anywhere."
        )
    R, T = batch.segment_ids.shape
    return create_block_mask(
        _rule(batch, window), R, None, T, T, device=str(device), _compile=device.type == "cuda"
    )


_MASKS: dict[str, Callable[[PairBatch, torch.dtype, int | None], Mask]] = {
    "segments": segment_mask,
    "flex_attention": flex_mask,
    "sdpa": dense_mask,
    "eager": dense_mask,
}
