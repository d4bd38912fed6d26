"""Measures of rotations, weights and hidden states. Pure functions, nothing is trained by them.

What holds by construction is a test of the code, never evidence about a trained model: R is
orthogonal, so the cosines between the neurons of a rotated weight and its hyperspherical energy do
not move (while the magnitudes stay positive). Evidence comes from hidden states and outputs, and
from weights trained without that constraint.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft.tuners.boft.layer import Linear as BOFTLinear
from peft.tuners.hra.layer import HRALinear
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rotopo.devices import for_float64
from rotopo.errors import InputError
from rotopo.models.sharding import gathered, in_turn
from rotopo.rotation.givens import Delta
from rotopo.rotation.layer import RotationLinear, is_quantised

ROTATING_LAYERS = (RotationLinear, OFTLinear, BOFTLinear, HRALinear)


def orthogonality_errors(model: nn.Module) -> dict[str, float]:
    """`orthogonality_error` of every rotating layer by its name in the model, the largest over its
    active adapters. Empty for a model without such layers."""
    errors = {}
    names = {module: name for name, module in model.named_modules()}
    for layer in (layer for group in in_turn(model) for layer in group):
        if isinstance(layer, ROTATING_LAYERS):
            present = getattr(layer, layer.adapter_layer_names[0])
            active = [adapter for adapter in layer.active_adapters if adapter in present]
            if active:
                errors[names[layer]] = max(
                    orthogonality_error(layer, adapter) for adapter in active
                )
    return errors


@torch.no_grad()
def orthogonality_error(layer: nn.Module, adapter_name: str = "default", probes: int = 64) -> float:
    """max |RᵀR − I| of an adapter's input rotation, products in float64 so that they add no error.

    For RotationLinear it is round-off by construction: a check. For PEFT's OFT, BOFT and HRA it
    says whether their approximation holds (OFT's Cayley–Neumann series drifts at larger norms).

    Args:
        layer: a RotationLinear, or PEFT's linear layer of OFT, BOFT or HRA, of D inputs.
        adapter_name: the adapter on that layer.
        probes: exact for D ≤ 1024; beyond, this many columns of RᵀR − I, evenly spaced.

    Raises:
        InputError: the layer is none of these, or has no such adapter.
    """
    if not isinstance(layer, ROTATING_LAYERS):
        raise InputError(
            f"No rotation to measure in a {type(layer).__name__}: give a linear layer of the "
            "rotation, OFT, BOFT or HRA tuner."
        )
    # The first adapter attribute of all of these holds a rotation for every adapter.
    adapters = getattr(layer, layer.adapter_layer_names[0])
    if adapter_name not in adapters:
        raise InputError(f"The layer has no adapter {adapter_name!r}, only {', '.join(adapters)}.")
    if isinstance(layer, RotationLinear):
        delta = Delta(*(None if t is None else _exact(t) for t in adapters[adapter_name]().delta))
        columns = _probe_columns(layer.in_features, probes)
        there_and_back = delta.inverse().rotate(delta.rotate(columns))
    else:
        # OFT and BOFT turn activations by rows @ R; HRA turns the weight by weight @ Rᵀ.
        if isinstance(layer, BOFTLinear):
            R, _magnitude = layer.get_delta_weight(adapter_name)
        elif isinstance(layer, HRALinear):
            R = layer.get_delta_weight(adapter_name).T
        else:
            R = layer.get_delta_weight(adapter_name)
        R = _exact(R)
        columns = _probe_columns(len(R), probes)
        there_and_back = columns @ R.T @ R
    return (there_and_back - columns).abs().max().item()


def _exact(t: Tensor) -> Tensor:
    return t.cpu().double()


def _probe_columns(D: int, probes: int) -> Tensor:
    """Unit vectors (D or probes, D) as rows; RᵀR is symmetric, so rows and columns are the same."""
    kept = torch.arange(D) if D <= 1024 else torch.linspace(0, D - 1, probes).long()
    return F.one_hot(kept, D).double()


@torch.no_grad()
def merged_weights(
    model: nn.Module, modules: Iterable[nn.Module] | None = None
) -> Iterator[Tensor]:
    """The weights (out, D) that a model computes with where it trains, in at least float32.

    Those of linear layers with an adapter, the adapter merged in, and of those that train
    themselves; but for the output head, and for quantised weights.

    Args:
        model: the model.
        modules: those of its modules that are asked for, their weights whole; None asks for all.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    left_out = set() if head is None else set(head.modules())
    adapted = {m for m in model.modules() if isinstance(m, BaseTunerLayer)} - left_out
    left_out |= {m for layer in adapted for m in layer.modules()} - adapted
    for module in model.modules() if modules is None else modules:
        layer = module.get_base_layer() if module in adapted else module
        if module in left_out or not isinstance(layer, nn.Linear | Conv1D):
            continue
        if is_quantised(layer) or not layer.weight.is_floating_point():
            continue
        if module in adapted:
            # A copy: in a half type, merging and its undoing would leave other weights behind.
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            copied: Any = copy.deepcopy(module).to(wide)
            copied.merge()
            layer = cast(nn.Linear, copied.get_base_layer())
        elif not layer.weight.requires_grad:
            continue
        weight = gathered(layer.weight)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        yield weight.T if isinstance(layer, Conv1D) else weight


def cosine_gram(weight: Tensor) -> Tensor:
    """Cosines between the neurons of a weight (out, D), as (out, out), in at least float32.

    Unchanged by construction under a rotation of the inputs and positive magnitudes.
    """
    rows = weight.to(torch.promote_types(weight.dtype, torch.float32))
    unit = F.normalize(rows, dim=1, eps=0.0)
    return unit @ unit.T


def neuron_cosine(weight: Tensor) -> Tensor:
    """Mean |cos| between two different neurons of a weight (out, D), a scalar in [0, 1].

    Constant by construction for rotated weights; evidence of collapse for weights tuned otherwise.
    """
    gram = cosine_gram(weight)
    n = len(gram)
    return (gram.abs().sum() - gram.diagonal().abs().sum()) / (n * (n - 1))


def hyperspherical_energy(weight: Tensor) -> Tensor:
    """HE(W) = Σ_{i≠j} 1/‖ŵ_i − ŵ_j‖ over the ordered pairs of unit neurons of a weight (out, D).

    Source: the diagnosis of RoPO (arXiv 2508.17637), as reported: HE rises under DPO against the
    SFT model. Constant by construction for rotated weights, so there a test, never evidence.
    Infinite when two neurons have the same direction.
    """
    squared = (2 - 2 * cosine_gram(weight)).clamp_min(0)
    return squared.fill_diagonal_(torch.inf).rsqrt().sum()


def effective_rank(hidden: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of hidden states (T, D), not centred.

    Source: Roy and Vetterli, "The effective rank" (2007). A scalar from 1 (one direction) to
    min(T, D) (all directions equally); nothing constrains it, so its fall is evidence of collapse.
    """
    hidden = hidden.to(for_float64(hidden.device))  # without float64, mps has no SVD either
    values = torch.linalg.svdvals(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()
