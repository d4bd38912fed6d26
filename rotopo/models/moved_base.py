"""Initialisations that take what the adapter starts with out of its base: W' = W − s·B₀A₀ (PiSSA,
OLoRA), so that base and adapter together are the model. All others leave the base alone, or are
refused: the reference would not be the model.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from rotopo.errors import InputError
from rotopo.models.sharding import share_of

ADAPTER = "default"  # PEFT's name of the only one
# Of LoRA's initialisations those that leave the base alone.
_IN_PLACE = (True, False, "gaussian", "orthogonal", "mica", "eva")
_OF_DATA = ("eva", "corda", "lora_ga")


def refuse_initialisation(adapter: PeftConfig, name: str) -> None:
    """Refuse what PEFT would replace by plain LoRA without a word, and what no reference can be
    made of.

    Raises:
        InputError: an initialisation from activations or gradients of data, or by quantising; or
            AdaLoRA, whose ranks would stay where they are.
    """
    if isinstance(adapter, AdaLoraConfig):
        raise InputError(
            f"{name}: AdaLoRA moves its ranks between layers in every step, by calls that are not "
            "made here, and without them it is another method: take peft.LoraConfig."
        )
    start = getattr(adapter, "init_lora_weights", True)
    if str(start).lower().startswith(_OF_DATA):
        raise InputError(
            f"{name}.init_lora_weights {start!r} needs activations or gradients of data before "
            "the first step, which are not collected here: take pissa, olora or true; or (EVA) "
            "initialise and save the adapter with PEFT, and name its folder in "
            f"{name.removesuffix('adapter')}path."
        )
    if start == "loftq":
        raise InputError(
            f"{name}.init_lora_weights 'loftq' puts quantised weights in the base's place, of "
            "which the base cannot be made again: set quantize and take another initialisation."
        )


def moves_base(adapter: PeftConfig | None) -> bool:
    """Whether an adapter may change the base's weights as it is put on, and be known for it."""
    return getattr(adapter, "init_lora_weights", True) not in _IN_PLACE


class Base:
    """A model's weights as they are before an adapter goes on.

    Args:
        model: without one.
        adapter: its configuration.
    """

    def __init__(self, model: nn.Module, adapter: PeftConfig) -> None:
        self._parameters = dict(model.named_parameters())
        if any(p.is_meta for p in self._parameters.values()):  # to plan with: nothing to compare
            self._parameters.clear()
        self._samples = {name: sample(p) for name, p in self._parameters.items()}
        self._whole: dict[int, Tensor] = {}
        if moves_base(adapter):
            self._whole = {id(p): p.detach().clone() for p in self._parameters.values()}

    def moved(self, adapted: nn.Module, name: str) -> dict[str, Tensor]:
        """The original weights, by layer, of those that the adapter has changed by its own product;
        their layers' weights are from then on what :func:`moved_weight` says.

        Args:
            adapted: the model with the adapter on it.
            name: what messages call the adapter.

        Raises:
            InputError: a weight has changed in another way.
        """
        here = {id(p) for p in adapted.parameters()}
        changed = {
            id(p): own
            for own, p in self._parameters.items()
            if id(p) not in here or not torch.equal(sample(p), self._samples[own])
        }
        found = {}
        for prefix, layer, weight in _layers(adapted):
            before = self._whole.get(id(weight))
            if before is None or torch.equal(weight, before):
                continue
            after = moved_weight(layer, before, dict(layer.named_parameters()), "")
            rounding = 8 * torch.finfo(weight.dtype).eps * before.abs().max()
            if (after - weight).abs().max() <= rounding:
                weight.data = after
                found[prefix] = before
                changed.pop(id(weight), None)
        if changed:
            raise InputError(
                f"{name}: it changes {len(changed)} of the base's weights as it is put on "
                f"({min(changed.values())}, for one), and not by what it adds to them again: the "
                "reference would be another model. Take another initialisation."
            )
        return found


def moved_weight(layer: Any, weight: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """W − s·B₀A₀, computed in float32 at least and rounded once.

    Args:
        layer: of LoRA.
        weight: W, as the layer's base has it.
        tensors: A₀ and B₀ among others, by their parameters' names.
        prefix: of the layer's.
    """
    A, B = (tensors[f"{prefix}lora_{part}.{ADAPTER}.weight"] for part in "AB")
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = layer.scaling[ADAPTER] * (B.to("cpu", wide) @ A.to("cpu", wide))
    if layer.fan_in_fan_out:
        delta = delta.T
    return (weight.to("cpu", wide) - delta).to(weight.dtype).to(weight.device)


def move_to_start(
    adapted: nn.Module, originals: dict[str, Tensor], start: dict[str, Tensor]
) -> None:
    """Let the base be what a saved start makes of it.

    Args:
        adapted: the model with the adapter on it, divided or not.
        originals: as of :meth:`Base.moved`.
        start: the adapter's tensors when it was put on, whole, by their names in ``adapted``.
    """
    for prefix, layer, weight in _layers(adapted):
        if prefix in originals:
            moved = moved_weight(layer, originals[prefix], start, f"{prefix}.")
            with torch.no_grad():
                weight.copy_(share_of(moved, weight))


@torch.no_grad()
def save_for_untouched_base(adapted: PeftModel, start: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter for the base as it was before: W' + s·BA is W + s·[B, −B₀][A; A₀], plain
    LoRA of twice the rank.

    Args:
        adapted: the model, trained.
        start: A₀ and B₀ among others, by their parameters' names in the model without PEFT's part.
        folder: to write to.
    """
    state: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name, value in state.items():
        own, prefix = name.removeprefix("base_model.model."), ".lora_"
        started = start.get(own.removesuffix("weight") + f"{ADAPTER}.weight")
        if own.endswith(f"{prefix}A.weight"):
            assert started is not None
            state[name] = torch.cat([value, started.to(value)], dim=0)
        elif own.endswith(f"{prefix}B.weight"):
            assert started is not None
            state[name] = torch.cat([value, -started.to(value)], dim=1)
    config: Any = copy.deepcopy(adapted.peft_config[ADAPTER])
    # So that s, α / r or α / √r, stays what it is.
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {k: 2 * v for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: factor * v for k, v in config.alpha_pattern.items()}
    config.init_lora_weights, config.inference_mode = True, True
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(folder)


def sample(parameter: Tensor) -> Tensor:
    """A few of a weight's values [at most 127], by which a change of all of them shows."""
    flat = parameter.detach().as_subclass(Tensor).flatten()
    return flat[:: max(1, len(flat) // 64)].clone()


def _layers(adapted: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """LoRA's layers on matrices: name, layer, and the base's weight."""
    for prefix, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is not None:
                yield prefix, layer, weight
