"""A model divided among ranks: of every weight each rank holds a share (torch's FSDP2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from rotopo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rotopo.models.backbone import Backbone


@dataclass(frozen=True)
class Sharding:
    """How a model is divided.

    Attributes:
        mesh: the ranks, in one dimension.
        offload: keep the shares, their gradients and the optimiser's state in the processor's
            memory, and bring a layer to the device for as long as it is computed.
    """

    mesh: DeviceMesh
    offload: bool = False


def divide(backbone: "Backbone", base: set[int], dtype: torch.dtype, sharding: Sharding) -> None:
    """Leave every rank its share of each weight, layer by layer, and the rest as one last unit.

    The weights may lie in a file that is mapped to memory, of any dtype: only one layer at a time
    is read and converted, so that no rank ever holds the whole model.

    Args:
        backbone: policy or scorer; its methods that work on the model gather what they need.
        base: ids of the base model's parameters.
        dtype: of these; what else trains keeps its own where that is wider.
        sharding: how.

    Raises:
        InputError: weights of several dtypes train.
    """
    backbone.sharding = sharding
    settings: dict[str, Any] = {"mesh": sharding.mesh}
    if sharding.offload:
        pinned = sharding.mesh.device_type == "cuda"
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    models = [m for m in (backbone.language_model, backbone.reference) if m is not None]
    for unit in (*(layer for model in models for layer in decoder_layers(model)), backbone):
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):
                wide = torch.promote_types(parameter.dtype, dtype)
                parameter.data = parameter.data.to(dtype if id(parameter) in base else wide)
        trained = {p.dtype for p in unit.parameters() if p.requires_grad}
        if len(trained) > 1:
            raise InputError(
                "dtype: FSDP2 trains weights of one dtype, and here some in float32 (a reward "
                f"model's head, an adapter's own) train beside weights of the model in {dtype}: "
                "set the model's dtype to float32, or train an adapter alone."
            )
        # Gradients in a half type would be rounded once more where the ranks add them up.
        narrow = trained <= {torch.bfloat16, torch.float16} and bool(trained)
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
        fully_shard(unit, mp_policy=policy, **settings)
    for method in ("hidden_states", "generate", "cache_reference"):
        if hasattr(backbone, method):
            register_fsdp_forward_method(backbone, method)


def decoder_layers(model: "PreTrainedModel") -> list[nn.Module]:
    """The modules that the model's family says are never to be split; none if it says nothing."""
    names = model._no_split_modules or ()
    kind = "FSDP"  # which fully_shard puts before the name of what it divides
    return [m for m in model.modules() if type(m).__name__.removeprefix(kind) in names]


def whole(value: Any) -> Any:
    """A tensor as it would be on one rank, on the processor; all ranks have to ask together."""
    if not isinstance(value, DTensor):
        return value.detach().cpu() if isinstance(value, Tensor) else value
    # Offloaded shares travel by way of the device.
    here: Any = value.detach().to(value.device_mesh.device_type)
    return here.full_tensor().cpu()


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as another one is; each rank takes its own, and sends nothing."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    divided = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return divided.to(like.device)


def in_turn(root: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules inside one, in groups; a group's weights are whole while it is worked on.

    All ranks have to go through all groups together. Where nothing is divided, one group.
    """
    inside: set[nn.Module] = set()
    for unit in reversed([m for m in root.modules() if isinstance(m, FSDPModule)]):
        own = [m for m in unit.modules() if m not in inside]
        inside.update(own)
        unit.unshard()
        try:
            yield own
        finally:
            unit.reshard()
    yield [m for m in root.modules() if m not in inside]
