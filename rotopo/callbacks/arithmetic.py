"""The floating-point operations of a training step, and how many a GPU can do."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from transformers import PreTrainedModel

# TFLOP/s by the driver's name, as NVIDIA's data sheets give them for dense matrices: bfloat16 (and
# float16) with float32 sums, and float32 without TF32. A slice of a GPU (MIG) has another name.
_PEAKS = {
    "NVIDIA A10": (125, 31.2),
    "NVIDIA A30": (165, 10.3),
    "NVIDIA A40": (149.7, 37.4),
    "NVIDIA A100-PCIE-40GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA A100-SXM4-40GB": (312, 19.5),
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA L4": (121, 30.3),
    "NVIDIA L40": (181, 90.5),
    "NVIDIA L40S": (362, 91.6),
    "NVIDIA H100 PCIe": (756, 51),
    "NVIDIA H100 NVL": (835, 60),
    "NVIDIA H100 80GB HBM3": (989, 67),
    "NVIDIA H200": (989, 67),
    "NVIDIA H200 NVL": (835, 60),
    "NVIDIA GH200 480GB": (989, 67),
    "NVIDIA B200": (2250, 75),
    "NVIDIA RTX A6000": (154.8, 38.7),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 91.1),
    "NVIDIA GeForce RTX 3090": (71, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
}


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU in dense matrix products at most; None where no data sheet is at hand.

    Args:
        device: the GPU's name, as ``torch.cuda.get_device_name`` gives it.
        dtype: of the factors.
    """
    if device not in _PEAKS:
        return None
    half, single = _PEAKS[device]
    if dtype in (torch.bfloat16, torch.float16):
        return half * 1e12
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return single * 1e12
    return None


@dataclass(frozen=True)
class Decoder:
    """What a step of a language model costs.

    Attributes:
        linear: weights of the decoder's linear layers; an adapter's own are left out.
        head: weights of the output head; 0 for a model without one.
        width: numbers in a token's query and in its value, of all heads; None where the
            configuration does not say.
        windows: how many layers attend to the last so many positions (None: to all of them).
        trained: share of ``linear`` that trains itself, rather than an adapter on it.
        head_trained: whether the head, or rows of it, train.
        recomputed: whether the backward pass computes the activations again.
    """

    linear: int
    head: int
    width: int | None
    windows: dict[int | None, int]
    trained: float
    head_trained: bool
    recomputed: bool

    @classmethod
    def of(cls, model: "PreTrainedModel") -> Self:
        """Of a Hugging Face model, with or without adapters in its layers.

        Raises:
            ValueError: no layer of it is a linear one.
        """
        from rotopo.models.beside import in_use

        config = model.config.get_text_config()
        layers = list(_linear_layers(model.base_model))
        linear = sum(map(_size, layers))
        if not linear:
            raise ValueError(f"{type(model).__name__} has no linear layers")
        head = model.get_output_embeddings()
        window = getattr(config, "sliding_window", None)
        every = "sliding_attention" if window else "full_attention"
        n = getattr(config, "num_hidden_layers", 0)
        kinds = getattr(config, "layer_types", None) or [every] * n
        return cls(
            linear=linear,
            head=0 if head is None else _size(in_use(head)),
            width=_width(config),
            windows=dict(Counter(window if k == "sliding_attention" else None for k in kinds)),
            trained=sum(_size(layer) for layer in layers if layer.weight.requires_grad) / linear,
            head_trained=head is not None and any(p.requires_grad for p in head.parameters()),
            recomputed=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
        )

    def passes(self, reference: bool) -> float:
        """How often a training step computes a token, in units of the forward pass.

        Forward 1; backward 1 for the activations' gradients, and 1 more for the weights' where
        they train; 1 where activations are computed again; 1 for an online reference.
        """
        return 2 + self.trained + self.recomputed + reference

    def flops(self, tokens: int, targets: int, scores: Sequence[int], reference: bool) -> float:
        """Of a training step, without what is only computed again.

        Args:
            tokens: that go through the decoder.
            targets: that go through the head.
            scores: products of a query with a key that it sees, for each of ``windows``.
            reference: whether the reference is computed beside the policy.
        """
        assert self.width is not None
        linear = 2 * self.linear * tokens * (2 + self.trained + reference)
        head = 2 * self.head * targets * (2 + self.head_trained + reference)
        # Of a query a score, of a value its part in the output; both factors of both have a
        # gradient.
        visible = sum(n * layers for n, layers in zip(scores, self.windows.values(), strict=True))
        return linear + head + 2 * self.width * visible * (3 + reference)


def is_known(model: "PreTrainedModel") -> bool:
    """Whether :class:`Decoder` counts all that a model computes: not for mixtures of experts, of
    which a token meets a few, nor for layers that mix tokens in other ways than attention, keep
    their weights in other ways than linear layers do, or have values of another size than keys."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    experts = any("experts" in setting for setting in config.to_dict())
    # bitsandbytes' layers are linear ones too; others keep their weights as they like.
    quantised = getattr(model.config, "quantization_config", None) is not None
    bits = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return (
        not experts
        and (bits or not quantised)
        and kinds <= {"full_attention", "sliding_attention"}
        and _width(config) is not None
        and not any(map(_has_other_weights, _parts(model.base_model)))
    )


def _width(config: Any) -> int | None:
    """Numbers in a token's query and value, of all heads; None where a configuration does not say.
    In multi-head latent attention neither is head_dim."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    latent = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0)
    query = latent or getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * (query + (getattr(config, "v_head_dim", None) or query))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a model computes with, its linear layers as wholes: of those that an adapter
    changes the base's, of those that it trains whole the copies."""
    from rotopo.models.beside import in_use

    wrapped: Any = in_use(module)
    part = wrapped.get_base_layer() if hasattr(wrapped, "get_base_layer") else wrapped  # PEFT's
    yield part
    if not _is_linear(part):
        for child in part.children():
            yield from _parts(child)


def _linear_layers(module: nn.Module) -> Iterator[Any]:
    return filter(_is_linear, _parts(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "nx")  # nx: GPT-2's Conv1D


def _has_other_weights(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own that is no linear layer's and no embedding."""
    if _is_linear(module) or isinstance(module, nn.Embedding):
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _size(layer: Any) -> int:
    """Weights of a linear layer, also of one that is divided among ranks."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return layer.nx * layer.nf
