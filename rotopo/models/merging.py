"""An adapter merged into its base: for another one to be put on top, or to generate faster."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rotopo.errors import InputError
from rotopo.models.beside import untie
from rotopo.models.saved_adapter import SavedAdapter

# Of an update, what rounding may change before its matrix stays in float32 [ours].
_MOST_LOST = 0.1


class WideLinear(nn.Linear):
    """A linear layer whose weight is wider than what it is given and what it returns."""

    def forward(self, input: Tensor) -> Tensor:
        wide = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(input.to(wide), self.weight, bias).to(input.dtype)


@torch.no_grad()
def merge(
    model: PreTrainedModel, saved: SavedAdapter, setting: str, dtype: torch.dtype
) -> set[int]:
    """Merge an adapter into a model in place, in float32, each weight rounded once; but a linear
    layer keeps its weight in float32 where rounding would change its update by more than a tenth.

    Says how much of the update rounding has changed.

    Args:
        model: whole.
        saved: the adapter.
        setting: what messages call the model's settings.
        dtype: to round to, whatever the weights are held in: what is trained on in bfloat16 is the
            same base where it is exported in float32.

    Returns:
        Ids of the parameters that stay in float32.

    Raises:
        InputError: the adapter does not fit the model, or cannot be merged.
    """
    name = f"{setting}.path"
    if any(p.is_meta for p in model.parameters()):
        return set()
    try:
        adapted: Any = get_peft_model(model, saved.config)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: the adapter at {saved.path!r}: {error}") from error
    saved.load_into(adapted)
    untie(model)
    # By the modules, which stay: a merged rotation's weight is a parameter of its own.
    before: dict[tuple[int, str], Tensor] = {}
    for layer in list(model.modules()):
        if isinstance(layer, BaseTunerLayer):
            for module in layer.get_base_layer().modules():
                for key, parameter in module.named_parameters(recurse=False):
                    before[id(module), key] = parameter.detach().clone()
                    parameter.data = parameter.data.to(dtype).to(_wide(parameter.dtype))
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"{name}: the adapter at {saved.path!r} ({type(saved.config).__name__}) cannot be "
            f"merged ({error}): leave {setting}.adapter out to train it on."
        ) from error
    if merged is not model:
        raise InputError(f"{name}: the adapter at {saved.path!r} cannot be merged.")
    kept = _round(model, before, dtype)
    model.requires_grad_(True)
    return kept


def _round(model: nn.Module, before: dict[tuple[int, str], Tensor], dtype: torch.dtype) -> set[int]:
    """Round merged weights, but those that would lose too much, and hold them as before."""
    lost = updated = worst = 0.0
    kept: set[int] = set()
    for module in list(model.modules()):
        for key, parameter in module.named_parameters(recurse=False):
            old = before.pop((id(module), key), None)
            if old is None:
                continue
            rounded = parameter.data.to(dtype)
            update = float((parameter.data - old.to(dtype)).double().norm())
            error = float((parameter.data - rounded).double().norm())
            if error > _MOST_LOST * update and type(module) is nn.Linear:
                module.__class__ = WideLinear
                kept.add(id(parameter))
                continue
            parameter.data = rounded.to(old.dtype)
            if update:
                lost, updated = lost + error**2, updated + update**2
                worst = max(worst, error / update)
    share = (lost / updated) ** 0.5 if updated else 0.0
    rank_zero_info(
        f"Merged an adapter into its base: rounding changed {100 * share:.2g} % of the update (of "
        f"one weight {100 * worst:.2g} % at most); {len(kept)} weights that would have lost more "
        "than 10 % stay in float32."
    )
    return kept


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """A context within which the layers of an adapter multiply by what they merge to, for a model
    that computes many times without a gradient; the base's weights stay what and where they are.

    A half type would lose much of a small update: in the weight, and as much of it in an output
    that is rounded with and without it. There the weight and its update lie side by side, for
    one product that is rounded once. [ours]

    Layers that cannot be merged stay as they are, and so do those whose adapter is off, and whose
    weight is quantised, divided, or brought for each call; all do where there is too little room.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and _can_fold(m)]
    folding: list[Any] = []
    try:
        for layer in layers if _have_room(layers) else ():
            if forward := _folded(layer):
                layer.forward = forward
                folding.append(layer)
        yield
    finally:
        for layer in folding:
            del layer.forward


def _can_fold(layer: Any) -> bool:
    base = layer.get_base_layer()
    if layer.disable_adapters or layer.merged or type(base) not in (nn.Linear, Conv1D):
        return False
    hooked = "forward" in vars(base) or "forward" in vars(layer)  # by accelerate
    return not hooked and type(base.weight.data) is Tensor and not base.weight.is_meta


def _have_room(layers: list[Any]) -> bool:
    """Whether there is room for what takes up to twice the layers' weights, and for as much again,
    since keys need some too."""
    weights = [layer.get_base_layer().weight for layer in layers]
    needed = 2 * sum(w.nbytes for w in weights)
    fits = not weights or 2 * needed <= _free(weights[0].device)
    if not fits:
        rank_zero_info(
            f"Generating with the adapter's own layers, which is slower: merged ones would take "
            f"{needed / 2**30:.1f} GiB, more than half of what is free."
        )
    return fits


def _free(device: torch.device) -> float:
    """Bytes of a device's memory; without end where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    facts = Path("/proc/meminfo")
    if device.type != "cpu" or not facts.exists():
        return math.inf
    lines = (line.split() for line in facts.read_text("ascii").splitlines())
    return next((1024.0 * int(kib) for name, kib, *_ in lines if name == "MemAvailable:"), math.inf)


@torch.no_grad()
def _folded(layer: Any) -> Callable[..., Tensor] | None:
    """The forward of a layer with its adapter folded; None where it cannot be merged."""
    base = layer.get_base_layer()
    weight, bias = base.weight, base.bias
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        twin = copy.deepcopy(layer)
        for parameter in twin.get_base_layer().parameters(recurse=False):
            parameter.data = parameter.data.to(_wide(parameter.dtype))
        try:
            twin.merge()
        except (ValueError, TypeError, RuntimeError):  # as PEFT refuses in several ways
            return None
        merged = twin.get_base_layer()
        if bias is not None and not torch.equal(merged.bias, bias.to(merged.bias.dtype)):
            return None
        # Conv1D keeps its weight transposed.
        whole, own = ((m.weight.T if isinstance(m, Conv1D) else m.weight) for m in (merged, base))
        if _wide(dtype) == dtype:
            return lambda x, *args, **kwargs: F.linear(x, whole, bias)
        both = torch.cat([own.to(dtype), (whole - own.to(dtype)).to(dtype)], dim=1)
    return lambda x, *args, **kwargs: F.linear(torch.cat([x, x], dim=-1), both, bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
