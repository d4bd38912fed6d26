"""All that asks torch.distributed: who this process is, and what the ranks exchange.

A process without others is rank 0 of 1 and exchanges with itself.
"""

from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def are_several() -> bool:
    """Whether processes work together."""
    return distributed.is_available() and distributed.is_initialized()


def number() -> int:
    """This process's rank."""
    return distributed.get_rank() if are_several() else 0


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if are_several() else 1


def of_all(value: T) -> list[T]:
    """A value's counterparts on all ranks, in their order."""
    if not are_several():
        return [value]
    values: list[T | None] = [None] * count()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def of_first(value: T) -> T:
    """The first rank's counterpart of a value."""
    agreed = [value]
    if are_several():
        distributed.broadcast_object_list(agreed)
    return agreed[0]


def total(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors; without gradient."""
    values = values.detach().clone()
    if are_several():
        distributed.all_reduce(values)
    return values


def wait() -> None:
    """Until all ranks are here."""
    if are_several():
        distributed.barrier()
