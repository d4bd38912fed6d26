"""Float32 master weights that are computed with in bfloat16 (``compute_dtype``).

A unit is a decoder layer, or all else of the model together. While it computes, bfloat16 copies
stand in its parameters' places. They are made as its forward pass begins, so that a gradient is
computed in bfloat16, and arrives at the master, and is added up there, in float32. FSDP2 makes the
same copies of the shares that it gathers, see :func:`rotopo.models.sharding.divide`; this is for a
model that is whole.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from rotopo.errors import InputError
from rotopo.models.settings import BackboneConfig
from rotopo.models.sharding import decoder_layers

P = ParamSpec("P")
R = TypeVar("R")

# Where one parameter hangs, by module and name: in several places if weights are tied.
_Places = list[tuple[nn.Module, str]]


def compute_dtype(config: BackboneConfig) -> torch.dtype | None:
    """What ``compute_dtype`` says; None where a model computes in the dtype of its weights.

    Raises:
        InputError: another dtype than bfloat16, an adapter, or weights that are not float32.
    """
    if config.compute_dtype is None:
        return None
    name = f"{config.setting}.compute_dtype"
    if config.compute_dtype != "bfloat16":
        raise InputError(
            f"{name} is {config.compute_dtype!r}: it has to be bfloat16, or null for the dtype of "
            "the weights. (float16 would need its loss scaled, which is not done here.)"
        )
    if config.adapter is not None:
        raise InputError(
            f"{name} is for full fine-tuning, and {config.setting}.adapter is set: an adapter "
            f"stays in float32, and its base is kept and computed in {config.setting}.dtype: "
            "set that to bfloat16 instead."
        )
    if config.dtype not in ("auto", "float32"):
        raise InputError(
            f"{name} is for weights that are kept in float32, and {config.setting}.dtype is "
            f"{config.dtype}: set it to float32, or leave compute_dtype out."
        )
    return torch.bfloat16


def kept_wide(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose own weights the model's family keeps in float32 whatever it is loaded in:
    routers of some mixtures of experts, for one."""
    names = model._keep_in_fp32_modules_strict
    if not names:
        return []
    # As transformers finds them: anywhere in a parameter's name, with * for anything.
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names))
    return [
        module
        for prefix, module in model.named_modules()
        if any(pattern.search(f"{prefix}.{name}") for name in module._parameters)
    ]


def narrowed(model: PreTrainedModel, dtype: torch.dtype) -> dict[int, nn.Parameter]:
    """What gives a copy of a model weights in a half type, none of which trains.

    They are those that :class:`Masters` computes with, bit for bit.
    """
    kept = {id(p) for module in kept_wide(model) for p in module.parameters(recurse=False)}
    return {
        id(p): nn.Parameter(p.detach().to(p.dtype if id(p) in kept else dtype), requires_grad=False)
        for p in model.parameters()
    }


class Masters:
    """Puts copies in a half type in the places of a model's float32 parameters, for a while.

    From then on each decoder layer does so by itself as it computes, within its activation
    checkpoint and what is compiled of it. For the rest see :meth:`replaced`.

    Args:
        model: whole on this device; its layers become of another class, of the same name.
        dtype: of the copies.
        apart: modules whose own parameters stay as they are.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, apart: Sequence[nn.Module]
    ) -> None:
        self.dtype = dtype
        layers: list[Any] = decoder_layers(model)
        within = {id(module) for layer in layers for module in layer.modules()}
        left_out = {id(module) for module in apart}
        self._all = _places(model, left_out)
        self._outside = _places(model, left_out | within)
        for layer in layers:
            layer.__class__ = _replacing(layer.__class__)
            layer.masters, layer.compute_dtype = _places(layer, left_out), dtype

    def replaced(self, layers: bool = False) -> AbstractContextManager:
        """A context within which the copies stand in.

        Args:
            layers: in the decoder layers too, for a model that computes many times without a
                gradient; else only outside them.
        """
        return _replaced(self._all if layers else self._outside, self.dtype)


class HasMasters(Protocol):
    """What may compute with copies."""

    masters: Masters | None


B = TypeVar("B", bound=HasMasters)


def in_compute_dtype(
    method: Callable[Concatenate[B, P], R],
) -> Callable[Concatenate[B, P], R]:
    """A backbone's method that works on its model outside the layers too, with the copies there."""

    @functools.wraps(method)
    def replaced(self: B, *args: P.args, **kwargs: P.kwargs) -> R:
        with nullcontext() if self.masters is None else self.masters.replaced():
            return method(self, *args, **kwargs)

    return replaced


def _places(root: nn.Module, left_out: set[int]) -> list[_Places]:
    """Where each parameter inside a module hangs, but for those of some modules, by their ids."""
    places: dict[int, _Places] = {}
    for module in root.modules():
        if id(module) in left_out:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                places.setdefault(id(parameter), []).append((module, name))
    return list(places.values())


@contextmanager
def _replaced(parameters: list[_Places], dtype: torch.dtype) -> Iterator[None]:
    masters: list[tuple[_Places, Any]] = []
    try:
        for places in parameters:
            module, name = places[0]
            master: Any = module._parameters[name]
            if master.dtype != dtype:  # else one stands in already
                masters.append((places, master))
                _put(places, master.to(dtype))
        yield
    finally:
        for places, master in masters:
            _put(places, master)


def _put(places: _Places, parameter: Any) -> None:
    for module, name in places:
        module._parameters[name] = parameter


class _Replacing:
    """Mixed into a decoder layer's class."""

    masters: list[_Places]
    compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _replaced(self.masters, self.compute_dtype):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _replacing(layer: Any) -> Any:
    # Of the same name, by which transformers and decoder_layers know a layer. One class for all
    # layers, rather than a forward of each one's own, lets them share what is compiled.
    return type(layer.__name__, (_Replacing, layer), {})
