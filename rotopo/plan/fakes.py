"""A run's model with weights that have sizes and no values, and the optimiser on it."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rotopo.errors import InputError
from rotopo.models.loading import load_config, trained_dtype
from rotopo.models.policy import Policy
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig, PolicyConfig
from rotopo.models.sharding import Sharding, decoder_layers
from rotopo.pretrained import first_line
from rotopo.training import PairwiseModule

Device = Literal["cuda", "cpu"]
_ATTENTIONS = ("segments", "sdpa", "eager")


def model_config(settings: BackboneConfig, file: Path | None = None) -> PretrainedConfig:
    """The configuration of the model that the settings name; nothing else of it is read.

    Args:
        settings: of the model.
        file: a config.json, or a folder with one, to read instead.

    Raises:
        InputError: there is none, or it is of a model that cannot be planned.
    """
    if file is not None and not file.exists():
        raise InputError(f"--model-config: there is no {str(file)!r}.")
    try:
        config = load_config(str(file or settings.path), settings.setting)
    except InputError as error:
        if file is not None:
            raise InputError(f"--model-config {file}: {first_line(error)}") from error
        raise InputError(
            f"{error} To plan, its config.json is enough: rotopo plan --model-config FILE."
        ) from error
    for setting, given, why in (
        ("quantize", settings.quantize, "bitsandbytes packs weights by kernels of its own"),
        (
            "compile",
            settings.compile is True,
            "a compiler decides what is kept and what computed again",
        ),
        (
            "trust_remote_code",
            settings.trust_remote_code and hasattr(config, "auto_map"),
            "code of the model's own is not run here",
        ),
        (
            "path",
            getattr(config, "quantization_config", None),
            "the model's weights are quantised, by kernels of their own",
        ),
    ):
        if given:
            raise InputError(f"{settings.setting}.{setting} cannot be planned: {why}.")
    if settings.attention not in _ATTENTIONS:
        raise InputError(
            f"{settings.setting}.attention {settings.attention!r} cannot be planned: its kernel "
            f"does not run without values. Plan with {' or '.join(_ATTENTIONS)}."
        )
    return config


@contextmanager
def ranks(n: int) -> Iterator[Sharding]:
    """A process group in which the other ranks do nothing, for FSDP2 to work on.

    Raises:
        RuntimeError: this process is one of several already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers "fake"

    if dist.is_initialized():
        raise RuntimeError("FSDP2 is planned in a process by itself, without a process group.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield Sharding(init_device_mesh("cpu", (n,)))
    finally:
        dist.destroy_process_group()


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of a model with fewer layers of the same kind."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shorter


def without_values(
    module: PairwiseModule,
    config: PretrainedConfig,
    device: Device,
    checkpointing: bool,
    sharding: Sharding | None = None,
) -> PairwiseModule:
    """A module with its model on torch's ``meta`` device, adapted, and divided as the settings say.

    Args:
        module: not loaded; stays as it is.
        config: of the model.
        device: what it is going to run on, for the dtype of ``auto``.
        checkpointing: whether activations are computed again.
        sharding: how to divide it.

    Raises:
        InputError: an adapter that does not fit, or that needs the weights' values to be made.
    """
    settings = dataclasses.replace(module.model_config, activation_checkpointing=checkpointing)
    if settings.dtype == "auto" and settings.adapter is not None and device == "cuda":
        settings = dataclasses.replace(settings, dtype="bfloat16")  # whatever this machine has
    dtype = trained_dtype(settings)
    planned: Any = copy.deepcopy(module)
    scores = not hasattr(planned, "policy_config")
    config = copy.deepcopy(config)
    kind: Any = AutoModelForCausalLM
    if scores:
        config.num_labels, kind = 1, AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype, attn_implementation=settings.attention)
            if scores:
                planned.scorer = Scorer.build(model, settings, dtype, sharding)
            else:
                needs = planned.needs.reference
                planned.policy = Policy.build(
                    model, cast(PolicyConfig, settings), needs, dtype, sharding
                )
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError, ImportError) as error:
        adapter = type(settings.adapter).__name__ if settings.adapter else "without an adapter"
        raise InputError(
            f"{settings.setting} ({config.model_type}, {adapter}) cannot be planned: it cannot be "
            f"made without its weights' values: {first_line(error)}"
        ) from error
    return planned


def alike(model: PreTrainedModel) -> bool:
    """Whether all decoder layers of a model are of one kind, size and adapter."""
    kinds = {
        (
            type(layer),
            getattr(layer, "attention_type", None) or getattr(layer, "layer_type", None),
            tuple(
                (n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters()
            ),
        )
        for layer in decoder_layers(model)
    }
    return len(kinds) == 1


def materialise(module: nn.Module, mode: FakeTensorMode) -> None:
    """Let weights and buffers on the meta device be fake tensors on a processor: they go together
    with the real tensors of a batch, whose values shapes depend on."""
    made: dict[int, nn.Parameter] = {}
    with mode:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and _local(parameter).is_meta:
                    if id(parameter) not in made:  # tied weights stay tied
                        fake = nn.Parameter(_fake(parameter), parameter.requires_grad)
                        made[id(parameter)] = fake
                    part._parameters[name] = made[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = _fake(buffer)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                state: Any = part._get_fsdp_state()
                # One group for each module, by another name before torch 2.12.
                groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
                for group in groups:
                    for share in group.fsdp_params:
                        share.reset_sharded_param()  # as to_empty() has it done


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _fake(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(_local(tensor), device="cpu")
    if not isinstance(tensor, DTensor):
        return empty
    return DTensor(empty, tensor._spec, requires_grad=False)
