"""RoPO's rotation as a PEFT tuner: y = s ⊙ (W Rᵀx) + bias with R orthogonal and W frozen.

Source: RoPO, arXiv 2508.17637 (EMNLP 2025). R acts on the inputs of a linear layer and s on its
outputs. `rotopo.rotation.givens` and `.householder` say what of R is the paper's and what is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rotopo.errors import InputError
from rotopo.rotation.activations import rotated_input, scaled_output
from rotopo.rotation.givens import Delta, chain, tree
from rotopo.rotation.householder import after_reflections


class _PeftType(StrEnum):
    """Stands beside PEFT's own enumeration, which is closed; transformers reads its value."""

    ROTATION = "ROTATION"


PEFT_TYPE: Any = _PeftType.ROTATION

Givens = Literal["bidirectional", "forward", "none"]
Layout = Literal["tree", "chain"]


@dataclass
class RotationConfig(PeftConfig):
    """RoPO: rotate the inputs of frozen linear layers and rescale their outputs.

    The defaults fit the share of parameters that RoPO publishes for Llama-3-8B, 0.015 %: q and v,
    2(D − 1) Givens angles, 2 D-vectors and one magnitude per output, 1,212,288 in all. The count
    does not decide the form. q and v, or q and k, k and o, v and o have the same; so has one vector
    with a magnitude per input beside those per output; and a second Givens factor in the place of
    the vectors (``givens_factors: 2``, ``n_householder: 0``) has 1,212,160, 0.01509 %, which fits
    the paper's "multi-granularity" as well. So q and v are LoRA's custom [ours], and Householder
    against a second factor is undecided [ours]: try both.

    Angles start at zero and Adam moves them by about one learning rate a step: start from 1e-3 …
    2e-2, not from DPO's 5e-7, and without weight decay [ours].

    Args:
        target_modules: Names (or name endings) of the linear layers to rotate, or one regular
            expression for their full names, or "all-linear".
        n_householder: Householder vectors per layer, an even number; 0 leaves the reflections out.
        givens: The Givens rotations: "bidirectional" has a forward and a reverse sweep with their
            own angles, "forward" only the first, "none" leaves them out.
        givens_factors: Givens rotations one after the other, 1 or 2, each with its own angles. The
            second one's pairs are one coordinate further along, within blocks of some √D: on the
            pairs of the first it would have no plane of its own at the start, and its first stage
            would only add to the last one of the first [ours].
        layout: Which pairs the Givens sweeps rotate: "tree", fast, or "chain" (neighbours one
            after the other), an ablation that builds a D × D matrix.
        magnitude: Whether to train a magnitude per output neuron.
        task_type: PEFT's task type; not needed for causal language models here.
        peft_type: Set by the class; leave empty.
        auto_mapping: Set by PEFT when saving; leave empty.
        peft_version: Set by PEFT when saving; leave empty.
        base_model_name_or_path: Set by PEFT when saving; leave empty.
        revision: Revision of the base model on the hub.
        inference_mode: Freeze the adapter too.

    Raises:
        InputError: a setting has an unknown value, or nothing is left to train.
    """

    target_modules: list[str] | str = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Linear layers to rotate: names, a regular expression, or all-linear."},
    )
    n_householder: int = field(
        default=2, metadata={"help": "Householder vectors per layer, even; 0 for none."}
    )
    givens: Givens = field(
        default="bidirectional", metadata={"help": "bidirectional, forward or none."}
    )
    givens_factors: int = field(
        default=1, metadata={"help": "Givens rotations in a row, 1 or 2 (an ablation)."}
    )
    layout: Layout = field(default="tree", metadata={"help": "tree (fast) or chain (ablation)."})
    magnitude: bool = field(default=True, metadata={"help": "Train a magnitude per output neuron."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if not self.target_modules:
            raise InputError("target_modules is empty: name the layers to rotate, e.g. [q_proj].")
        if self.n_householder < 0 or self.n_householder % 2:
            raise InputError(
                f"n_householder must be even and not negative, got {self.n_householder}: vectors "
                "start as equal pairs, whose reflections cancel."
            )
        if self.givens not in get_args(Givens):
            raise InputError(f"givens must be one of {get_args(Givens)}, got {self.givens!r}.")
        if self.givens_factors not in (1, 2):
            raise InputError(f"givens_factors must be 1 or 2, got {self.givens_factors}.")
        if self.givens_factors == 2 and self.givens == "none":
            raise InputError(
                "givens_factors is 2 and givens none: say which sweeps the factors have."
            )
        if self.layout not in get_args(Layout):
            raise InputError(f"layout must be one of {get_args(Layout)}, got {self.layout!r}.")
        if self.givens == "none" and not self.n_householder and not self.magnitude:
            raise InputError(
                "Nothing to train: givens is none, n_householder 0 and magnitude false; "
                "turn one of them on."
            )


class Factors(NamedTuple):
    """What an adapter does to a weight: W′ = diag(1 + magnitude) · W · (I + Δ).

    Shapes: blocks, left, right as in `Delta`; magnitude (out,) = s − 1, or None.
    """

    blocks: Tensor | None
    left: Tensor | None
    right: Tensor | None
    magnitude: Tensor | None

    @property
    def delta(self) -> Delta:
        return Delta(self.blocks, self.left, self.right)


class Rotation(nn.Module):
    """The parameters of one adapter on one layer; calling it gives their `Factors`.

    Parameters (those that the configuration turns off are None): `angles` (sweeps, D − 1) radians,
    zeros, with 1 or 2 sweeps for each factor, the first factor's first; `householder`
    (n_householder, D), equal pairs from N(0, I), so that a learning rate turns them by about as
    much as it turns an angle [ours]; `magnitude` (out,) = s − 1, zeros, with s the ratio of the
    neuron's magnitude to the norm of its frozen weight.
    """

    def __init__(self, config: RotationConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layout = config.layout
        self.factors = config.givens_factors
        sweeps = {"bidirectional": 2, "forward": 1, "none": 0}[config.givens] * self.factors
        self.angles = nn.Parameter(torch.zeros(sweeps, in_features - 1)) if sweeps else None
        pairs = torch.randn(config.n_householder // 2, in_features)
        self.householder = nn.Parameter(pairs.repeat_interleave(2, 0)) if len(pairs) else None
        self.magnitude = nn.Parameter(torch.zeros(out_features)) if config.magnitude else None

    def forward(self) -> Factors:
        """The factors, in float32 or, for float64 parameters, float64."""
        angles, vectors, magnitude = (
            None if p is None else p.to(torch.promote_types(p.dtype, torch.float32))
            for p in (self.angles, self.householder, self.magnitude)
        )
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            delta = Delta()
            if angles is not None:
                factor = tree if self.layout == "tree" else chain
                delta, *second = (factor(part) for part in angles.chunk(self.factors))
                if second:
                    delta = second[0].shifted(angles.shape[1] + 1).after(delta)
            if vectors is not None:
                delta = after_reflections(delta, vectors)
        # A copy: FSDP1 frees a parameter's own memory behind the call that gathered it.
        return Factors(*delta, None if magnitude is None else magnitude.clone())


def fold(weight: Tensor, adapters: list[Factors]) -> Tensor:
    """weight (out, D) with the adapters applied one after the other, rounded once at the end."""
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.to(_factor_dtype(adapters))
        for factors in adapters:
            rows = _scaled(factors.delta.rotate(rows), factors)
        rows = rows.to(weight.dtype)
    # Conv1D keeps its weight transposed. The same layout gives the same product bit for bit.
    return rows if weight.is_contiguous() else rows.T.contiguous().T


def _factor_dtype(adapters: list[Factors]) -> torch.dtype:
    return next(t.dtype for factors in adapters for t in factors if t is not None)


def _scaled(rows: Tensor, factors: Factors) -> Tensor:
    return rows if factors.magnitude is None else rows * (1 + factors.magnitude)[:, None]


class _FoldedLinear(torch.autograd.Function):
    """F.linear(x, fold(weight, adapters), bias), with the folded weight made anew in the backward.

    Autograd would keep the folded weight and several float32 copies of it for every layer; here a
    layer keeps only x and the small factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, *flat: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *flat)
        return F.linear(x, fold(weight, _grouped(flat)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *flat = ctx.saved_tensors
        adapters = _grouped(flat)
        with torch.autocast(x.device.type, enabled=False):
            rows = weight.to(_factor_dtype(adapters))
            steps = []
            for factors in adapters:
                rotated = factors.delta.rotate(rows)
                steps.append((factors, rows, rotated))
                rows = _scaled(rotated, factors)
            # Under autocast x and weight can be wider than what the forward multiplied.
            folded = rows.to(weight.dtype).to(grad_y.dtype)
            grad_x = (grad_y @ folded).to(x.dtype) if ctx.needs_input_grad[0] else None
            grad_y = grad_y.reshape(-1, grad_y.shape[-1])
            grad_bias = grad_y.sum(0) if ctx.needs_input_grad[1] else None
            grad = (grad_y.T @ x.reshape(-1, x.shape[-1]).to(grad_y.dtype)).to(rows.dtype)
            grads: list[Tensor | None] = []
            for factors, rows, rotated in reversed(steps):
                magnitude = None if factors.magnitude is None else (grad * rotated).sum(1)
                grad = _scaled(grad, factors)
                grads = [*factors.delta.gradient(rows, grad), magnitude, *grads]
                if ctx.needs_input_grad[2] or factors is not adapters[0]:
                    grad = factors.delta.inverse().rotate(grad)
        grad_weight = grad.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_bias, grad_weight, *grads


def _grouped(flat: Sequence[Tensor | None]) -> list[Factors]:
    size = len(Factors._fields)
    return [Factors(*flat[i : i + size]) for i in range(0, len(flat), size)]


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer is bitsandbytes', whose parameter is not the weight (out, D)."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__)


class RotationLayer(nn.Module, BaseTunerLayer):
    """A frozen nn.Linear, transformers Conv1D or quantised linear layer with its rotations.

    Several active adapters act as if merged one after the other, in the order of activation. Every
    call makes the factors anew: to generate token by token, merge first.
    """

    adapter_layer_names = ("rotation_adapter",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RotationConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rotation_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self._active_adapter = adapter_name
        self.quantised = is_quantised(base_layer)
        if isinstance(base_layer, nn.Linear):
            self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        else:
            self.out_features, self.in_features = self._weight.shape
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RotationConfig) -> None:
        """Add an adapter, the identity at first."""
        rotation = Rotation(config, self.in_features, self.out_features)
        self.rotation_adapter[adapter_name] = rotation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def _weight(self) -> Tensor:
        """The base weight as (out, D)."""
        return self.weight.T if isinstance(self.base_layer, Conv1D) else self.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (…, D) → (…, out).

        With more tokens than outputs the rotation is folded into the weight, else, and where the
        weight is quantised, it is applied to the activations: the same function.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.rotation_adapter]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        adapters = [self.rotation_adapter[name]() for name in active]
        if not self.quantised and x.numel() // self.in_features > self.out_features:
            flat = [t for factors in adapters for t in factors]
            return _FoldedLinear.apply(x, self.bias, self._weight, *flat)
        rows = rotated_input(x, [factors.delta for factors in adapters])
        y = self.base_layer(rows, *args, **kwargs)
        return scaled_output(
            y, self.bias, [f.magnitude for f in adapters if f.magnitude is not None]
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (all active ones by default) into the base weight.

        The weight before merging is kept, so that `unmerge` restores it exactly; `merge_and_unload`
        drops it with the layer.

        Raises:
            InputError: the base weight is quantised, or safe_merge is set and the merged weight is
                not finite.
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.rotation_adapter
        ]
        if not names:
            return
        if self.quantised:
            raise InputError(
                f"Merging {', '.join(names)} into a quantised weight would round it once more: "
                "put the adapter on the model in full precision, and merge it there."
            )
        with torch.no_grad():
            merged = fold(self._weight, [self.rotation_adapter[name]() for name in names])
        if safe_merge and not merged.isfinite().all():
            raise InputError(f"Merging {', '.join(names)} gives a weight that is not finite.")
        if self._unmerged_weight is None:
            self._unmerged_weight = self.weight.data
        self.weight.data = merged.T if isinstance(self.base_layer, Conv1D) else merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight as it was before any merge, bit for bit."""
        if self._unmerged_weight is not None:
            self.weight.data = self._unmerged_weight.to(self.weight)
            self._unmerged_weight = None
            self.merged_adapters.clear()


class RotationModel(BaseTuner):
    """The tuner that PEFT builds for a `RotationConfig`: it puts a `RotationLayer` on each target.

    Raises:
        InputError: a target module is neither nn.Linear nor Conv1D, or its weight is quantised by
            something else than bitsandbytes.
    """

    prefix = "rotation_"
    tuner_layer_cls = RotationLayer

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, RotationLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear | Conv1D) or not (
            target.weight.is_floating_point() or is_quantised(target)
        ):
            raise InputError(
                f"target_modules matches {current_key!r}, a {type(target).__name__}; a rotation "
                "needs nn.Linear or Conv1D with a floating-point weight, or bitsandbytes' linear "
                "layers. Narrow target_modules."
            )
        layer = RotationLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = RotationConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = RotationModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = RotationModel.prefix
