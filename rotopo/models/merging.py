"""An adapter merged into its base, for another one to be put on top."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
