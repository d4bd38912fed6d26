"""A model divided among ranks: of every weight each rank holds a share (torch's FSDP2)."""

from collections.abc import Iterator, Mapping, Sequence
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

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        if self.mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.mesh.device_type)


def divide(
    root: nn.Module,
    models: "Sequence[PreTrainedModel]",
    base: Mapping[int, torch.dtype | None],
    dtype: torch.dtype,
    sharding: Sharding,
    compute_dtype: torch.dtype | None = None,
    apart: Sequence[nn.Module] = (),
) -> None:
    """Leave every rank its share of each weight, layer by layer, and the rest as one last unit.

    The weights may lie in a file that is mapped to memory, of any dtype: only one layer at a time
    is read and converted, so that no rank ever holds the whole model.

    Args:
        root: what holds the models; its methods that work on them gather what they need.
        models: whose decoder layers are units of their own.
        base: the dtype of each of the base model's parameters, by its id.
        dtype: of what else trains, which keeps its own where that is wider.
        sharding: how.
        compute_dtype: of the weights as they are gathered, to be computed with; None leaves them.
        apart: modules whose weights are computed with as they are all the same.

    Raises:
        InputError: weights of several dtypes train, or are to be computed with as they are beside
            others in one module.
    """
    settings: dict[str, Any] = {"mesh": sharding.mesh}
    if sharding.offload:
        pinned = sharding.mesh.device_type == "cuda"
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    layers = [layer for model in models for layer in decoder_layers(model)]
    kept = {id(p) for module in apart for p in module.parameters(recurse=False)}
    for unit in (*reversed(apart), *layers, root):  # what is inside another unit first
        others = (p for p in unit.parameters() if id(p) not in kept and not isinstance(p, DTensor))
        if unit in apart and any(True for _ in others):
            raise InputError(
                f"compute_dtype: {type(unit).__name__} keeps some weights in float32, beside "
                "others, which FSDP2 cannot: take configs/strategies/ddp.yaml, or leave it out."
            )
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):
                wide = torch.promote_types(parameter.dtype, dtype)
                parameter.data = parameter.data.to(base.get(id(parameter)) or wide)
        trained = {p.dtype for p in unit.parameters() if p.requires_grad}
        if len(trained) > 1:
            raise InputError(
                "dtype: FSDP2 trains weights of one dtype, and here some in float32 (a reward "
                f"model's head, an adapter's own) train beside weights of the model in {dtype}: "
                "set the model's dtype to float32, or train an adapter alone."
            )
        # Gradients in a half type would be rounded once more where the ranks add them up.
        narrow = trained <= {torch.bfloat16, torch.float16} and bool(trained)
        policy = MixedPrecisionPolicy(
            param_dtype=None if unit in apart else compute_dtype,
            reduce_dtype=torch.float32 if narrow or compute_dtype is not None else None,
            cast_forward_inputs=False,  # angles of positions, say, which stay in float32
        )
        fully_shard(unit, mp_policy=policy, **settings)
    for method in ("hidden_states", "generate", "cache_reference"):
        if hasattr(root, method):
            register_fsdp_forward_method(root, method)


def decoder_layers(model: "PreTrainedModel") -> list[nn.Module]:
    """The modules that the model's family says are never to be split; none if it says nothing."""
    names = model._no_split_modules or ()
    kind = "FSDP"  # which fully_shard puts before the name of what it divides
    return [m for m in model.modules() if type(m).__name__.removeprefix(kind) in names]


def gathered(value: Tensor) -> Tensor:
    """A tensor as it would be on one rank; all ranks have to ask together."""
    if not isinstance(value, DTensor):
        return value.detach()
    # Offloaded shares travel by way of the device.
    here: Any = value.detach().to(value.device_mesh.device_type)
    return here.full_tensor()


def whole(value: Any) -> Any:
    """As :func:`gathered`, on the processor; what is no tensor as it is."""
    return gathered(value).cpu() if isinstance(value, Tensor) else value


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
