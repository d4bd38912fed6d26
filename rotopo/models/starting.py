"""An adapter as it started: what the reference computes with, and what a run resumes from."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from rotopo.errors import InputError
from rotopo.models.modes import evaluating
from rotopo.models.settings import BackboneConfig
from rotopo.pretrained import first_line


class StartingAdapter(nn.Module):
    """The values that an adapter's parameters had before the first step.

    They are exchanged with those that train for as long as the reference computes: no layer of an
    adapter needs a second one beside it, and nothing that looks at parameters (optimiser,
    checkpoint, strategy) ever sees two.

    Args:
        model: with the adapter on it, divided or not.
        names: of the parameters that train.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        own = dict(model.named_parameters())
        self._names = names
        self._trained = [own[name] for name in names]  # in a list, which registers none of them
        # As parameters they move with the model to its device, and DDP gives all ranks the same.
        self.values = nn.ParameterList(
            nn.Parameter(own[name].detach().clone(), requires_grad=False) for name in names
        )

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the parameters that they are the start of."""
        return dict(zip(self._names, self.values, strict=True))

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """A context within which the model computes with its start, without dropout."""
        with evaluating(model):
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, start in zip(self._trained, self.values, strict=True):
            if isinstance(parameter, DTensor):  # FSDP2 gathers from this memory and no other
                ours, other = parameter.to_local(), cast(DTensor, start).to_local()
                before = ours.clone()
                ours.copy_(other)
                other.copy_(before)
            else:
                parameter.data, start.data = start.data, parameter.data


def refuse_trained_base(model: nn.Module, base: Container[int], config: BackboneConfig) -> None:
    """Refuse an adapter that trains the base too, whose start is then no reference.

    Args:
        model: with the adapter on it.
        base: ids of the base's parameters.
        config: its settings.

    Raises:
        InputError: it does.
    """
    changed = sum(p.requires_grad for p in model.parameters() if id(p) in base)
    if changed:
        raise InputError(
            f"{config.setting}.adapter ({type(config.adapter).__name__}) also trains {changed} "
            "parameters of the base model (its biases, say): switched off, it would not be the "
            "reference any more."
        )


@torch.no_grad()
def starts_as_identity(model: nn.Module, name: str) -> bool:
    """Whether an adapter that has just been put on changes no layer's output, bit for bit: then the
    reference is the adapter switched off. Whatever cannot be told is answered with no.

    Args:
        model: with the adapter on it.
        name: what messages call the adapter.

    Raises:
        InputError: a layer of the adapter does not work by itself.
    """
    if any(p.is_meta for p in model.parameters()):
        return True  # to plan with, where nothing is computed
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with evaluating(model):
        try:
            return all(_changes_nothing(layer) for layer in layers)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{name} does not work here: a layer of it fails by itself ({first_line(error)})."
            ) from error


def _changes_nothing(layer: BaseTunerLayer) -> bool:
    """Whether a layer of an adapter gives what its base gives of a few made-up inputs."""
    if isinstance(layer, TrainableTokensLayer):
        return True  # its rows start as copies
    base: Any = layer.get_base_layer()
    if not isinstance(base, nn.Embedding | nn.Linear | Conv1D):
        return False
    weight = base.weight
    if isinstance(base, nn.Embedding):
        x = torch.arange(0, len(weight), max(1, len(weight) // 64), device=weight.device)
    else:
        size = base.in_features if isinstance(base, nn.Linear) else base.nx
        noise = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        x = noise.to(weight.device, dtype)
    return torch.equal(cast(nn.Module, layer)(x), base(x))
