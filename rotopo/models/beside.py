"""What an adapter trains beside its own layers: whole modules, and the rows of some tokens.

PEFT wraps both: ``modules_to_save`` by a copy that trains beside the original, and
``trainable_token_indices`` by rows that take the place of the original's. A wrapper's ``weight`` is
that of the one in use, the original's where the adapter is switched off.
"""

from collections.abc import Iterator
from typing import Any, cast

from peft import PeftConfig, TrainableTokensConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotopo.errors import InputError
from rotopo.rotation.layer import is_quantised


def original(module: nn.Module) -> nn.Module:
    """A module as it was before an adapter wrapped it to train it, or rows of it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return cast(nn.Module, module.original_module)
    return module


def embeddings(model: PreTrainedModel) -> Tensor:
    """The weight of the input embeddings [V, D], without what an adapter trains of it."""
    return cast(Tensor, original(model.get_input_embeddings()).weight)


def in_use(module: nn.Module) -> nn.Module:
    """The copy that trains of a module that an adapter trains whole; else :func:`original`."""
    if isinstance(module, ModulesToSaveWrapper):
        return cast(nn.Module, module.modules_to_save[module.active_adapters[0]])
    return original(module)


def copies(model: nn.Module) -> set[int]:
    """Ids of the parameters of copies that train, which keep the dtype of the base."""
    wrappers = (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    return {id(p) for wrapper in wrappers for p in in_use(wrapper).parameters()}


def untie(model: Any) -> None:
    """Give the output head a weight of its own, if it shares the embedding's and an adapter is to
    be merged into one of them alone: PEFT would merge it into both."""
    embedding: Any
    head: Any
    embedding, head = (
        module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    tuned = isinstance(embedding, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    if not tuned or getattr(head, "tied_adapter", None) is not None:
        return
    one: Any
    other: Any
    one, other = (
        m.get_base_layer() if isinstance(m, BaseTunerLayer) else original(m)
        for m in (embedding, head)
    )
    if one.weight is other.weight:
        other.weight = nn.Parameter(other.weight.detach().clone(), requires_grad=False)


def read_outside(model: PreTrainedModel) -> bool:
    """Whether something trains whose weight is read outside the forward pass of its module: rows of
    tokens, or the output head, which is applied in tiles."""
    head = model.get_output_embeddings()
    return isinstance(head, AuxiliaryTrainingWrapper) or any(_token_layers(model))


def refuse(model: nn.Module, adapter: PeftConfig, name: str) -> None:
    """Refuse what PEFT would leave out or compute otherwise, without a word.

    Args:
        model: with the adapter on it.
        adapter: its configuration as given.
        name: what messages call it.

    Raises:
        InputError: a module to train that is not there or is quantised, rows that are not or are
            trained twice, or an output head whose bias PEFT would leave out.
    """
    for tokens in _token_layers(model):
        base = tokens.get_base_layer()
        if isinstance(base, AuxiliaryTrainingWrapper):
            raise InputError(
                f"{name} trains an embedding both whole (modules_to_save) and in some rows "
                "(trainable_token_indices): leave one of them out. Tied embeddings are one."
            )
        if getattr(base, "bias", None) is not None:
            raise InputError(
                f"{name}.trainable_token_indices: the model's output head has a bias, which PEFT "
                "leaves out there: train the head whole, by modules_to_save."
            )
    wrapped = {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    for found, wrapper in wrapped.items():
        if any(map(is_quantised, wrapper.modules())):
            raise InputError(
                f"{name}.modules_to_save: {found} is quantised, and a packed weight cannot train."
            )
    for module in getattr(adapter, "modules_to_save", None) or ():
        if not any(found.endswith(module) for found in wrapped):
            raise InputError(
                f"{name}.modules_to_save names {module!r}, and the model has no such module."
            )


def refuse_tokens(weight: Tensor, adapter: PeftConfig, name: str) -> None:
    """Refuse rows that an embedding [V, D] does not have, before PEFT stumbles over them.

    Raises:
        InputError: a token that is not there, or one twice.
    """
    given: Any
    if isinstance(adapter, TrainableTokensConfig):
        setting, given = f"{name}.token_indices", adapter.token_indices
    else:
        setting = f"{name}.trainable_token_indices"
        given = getattr(adapter, "trainable_token_indices", None)
    for tokens in given.values() if isinstance(given, dict) else [given or []]:
        for token in tokens:
            if not 0 <= token < len(weight):
                raise InputError(
                    f"{setting} names token {token}, and the model has 0 to {len(weight) - 1}: "
                    "enlarge its embedding (resize_token_embeddings), and save the model, first."
                )
        if len(set(tokens)) < len(tokens):
            raise InputError(f"{setting} names a token twice.")


def _token_layers(model: nn.Module) -> Iterator[TrainableTokensLayer]:
    return (m for m in model.modules() if isinstance(m, TrainableTokensLayer))
