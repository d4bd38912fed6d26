"""The attention mask that a batch needs, per family of models.

The padded layout needs none: with padding on the right, a causal model's real tokens never see
it. The shared-prompt layout needs a 4-D mask, and a family that slides a window over the past
must get the window in the mask, because transformers takes a 4-D mask as it is.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rotopo.data.batch import PairBatch
from rotopo.errors import InputError
from rotopo.models.segment_attention import with_segments


def attention_inputs(batch: PairBatch, config: PretrainedConfig, dtype: torch.dtype) -> dict:
    """Keyword arguments of the decoder's forward: masks and positions.

    Args:
        batch: R lines of T tokens.
        config: the decoder's configuration.
        dtype: dtype of the attention scores, for the additive mask [R, 1, T, T].

    Raises:
        InputError: the shared-prompt layout under an attention that a mask cannot express.
    """
    if batch.layout == "padded":
        return {}
    if config._attn_implementation not in ("segments", "sdpa", "eager"):
        raise InputError(
            f"policy.attention {config._attn_implementation!r} takes no 4-D mask: "
            "use 'segments', or set data.layout to 'padded'."
        )
    inputs: dict[str, Any] = {"position_ids": batch.position_ids}
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(
            f"Layers of type {', '.join(sorted(unknown))} ({config.model_type}) cannot share a "
            "prompt between responses: set data.layout to 'padded'."
        )
    seen = _visible(batch)

    def mask(seen: Tensor) -> Tensor:
        additive = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        additive = additive.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        blocks = config._attn_implementation == "segments"
        return with_segments(additive, batch) if blocks else additive

    if "sliding_attention" in kinds:
        assert window is not None
        inputs["attention_mask"] = {
            "full_attention": mask(seen),
            "sliding_attention": mask(seen & _within(batch, window)),
        }
    elif kinds or window is None:
        inputs["attention_mask"] = mask(seen)
    else:  # one window for every layer
        inputs["attention_mask"] = mask(seen & _within(batch, window))
    return inputs


def _visible(batch: PairBatch) -> Tensor:
    """Which key each query sees [R, T, T]: earlier tokens of the prompt and of its own response.

    Padding sees itself, so that no row of the softmax is empty.
    """
    segments = batch.segment_ids
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    prompt = segments[:, None, :] == 0
    own = segments[:, None, :] == segments[:, :, None]
    return causal & (own | prompt & (segments[:, :, None] > 0))


def _within(batch: PairBatch, window: int) -> Tensor:
    """Whether query and key are fewer than ``window`` positions apart [R, T, T]."""
    positions = batch.position_ids
    distance = positions[:, :, None] - positions[:, None, :]
    return (distance < window) | (batch.segment_ids < 0)[:, :, None]
