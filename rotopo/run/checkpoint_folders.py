"""Checkpoints as folders: each rank's share in a safetensors file of its own, the rest in another.

The shares are torch's distributed checkpoints in their safetensors form, which any number of ranks
can read; their other form is read by unpickling.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotopo import ranks
from rotopo.errors import InputError
from rotopo.files import sha256, to_disk, writing_whole

REST = "meta.pt"  # all but the shared tensors; by it Lightning tells such a folder, too


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a folder that has its name only when all of it is there; all ranks together.

    Args:
        path: of the folder.
        checkpoint: Lightning's, with each rank's shares of tensors.

    Raises:
        InputError: the ranks do not share that folder.
    """
    # Slow to import, here and below, and few checkpoints are folders.
    from torch.distributed import checkpoint as distributed
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    unfinished = path.with_name(f".{path.name}.unfinished")
    tensors: dict[str, Tensor] = {}
    states = [
        {**state, "state": {n: _aside(tensors, f"{i}.{n}", v) for n, v in state["state"].items()}}
        for i, state in enumerate(checkpoint.get("optimizer_states", []))
    ]
    rest = checkpoint | {"optimizer_states": states}
    rest["state_dict"] = _aside(tensors, "model", checkpoint["state_dict"])
    rank = ranks.number()
    try:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        ranks.wait()
        with _own_errors():
            writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
            distributed.save(tensors, storage_writer=writer)
        own = list(unfinished.glob(f"shard-{rank + 1:05}-*.safetensors"))
        for share in own:
            to_disk(share)
        hashes = ranks.of_all({share.name: sha256(share) for share in own})
        rest["shares"] = {name: value for part in hashes for name, value in part.items()}
        absent = [name for name in rest["shares"] if not (unfinished / name).is_file()]
        if ranks.of_all(absent)[0]:
            raise InputError(
                f"{path}: what other ranks have written is not here: let checkpoints lie in a "
                "folder that all nodes share."
            )
        if rank == 0:
            with writing_whole(unfinished / REST) as stream:
                torch.save(rest, stream)
            with replacing(path):
                unfinished.rename(path)
                to_disk(path.parent)
    finally:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    ranks.wait()


@contextmanager
def replacing(path: Path) -> Iterator[None]:
    """Put a checkpoint, if there is one, aside while another gets its name, where
    :func:`rotopo.run.checkpoints.last_good` finds it."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        _remove(old)
        path.rename(old)
    yield
    _remove(old)


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Torch's error of any rank as that rank's own, a full disk's for one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from error


def read(
    path: Path,
    rest: dict[str, Any],
    targets: Mapping[str, Tensor] | None = None,
    parameters: Sequence[Sequence[Tensor]] | None = None,
) -> dict[str, Any]:
    """The checkpoint as Lightning has it, whole, or as this rank's shares; all ranks together then.
    States of optimisers that nobody asked for stay away.

    Args:
        path: of the folder.
        rest: all but the shared tensors, see :func:`rotopo.run.checkpoints.check`.
        targets: divided tensors by name, like which the state dict is to be divided; None reads
            whole tensors, by one process alone.
        parameters: of each optimiser, by number, like which its state is to be divided; None asks
            for all, whole.
    """
    from torch.distributed import checkpoint as distributed
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(path))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, found in stored.items():
        kind, _, own = name.partition(".")
        like = None
        if kind == "model":
            like = targets.get(own) if targets is not None else None
        elif parameters is not None:
            if int(kind) >= len(parameters):
                continue
            like = parameters[int(kind)][int(own.partition(".")[0])]
        dtype = found.properties.dtype
        if like is not None and like.shape == found.size:
            tensors[name] = torch.empty_like(like, dtype=dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(found.size, dtype=dtype)
    with _own_errors():
        distributed.load(tensors, storage_reader=reader, no_dist=targets is None)
    for i, state in enumerate(rest["optimizer_states"]):
        for n, values in state["state"].items():
            _back(tensors, f"{i}.{n}", values)
    _back(tensors, "model", rest["state_dict"])
    return rest


def _aside(tensors: dict[str, Tensor], prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, None in the tensors' place, which are put aside."""
    found = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    tensors.update((f"{prefix}.{k}", v.detach()) for k, v in found.items())
    return values | dict.fromkeys(found)


def _back(tensors: dict[str, Tensor], prefix: str, values: dict[str, Any]) -> None:
    """Put the tensors back in their place."""
    for k in values:
        if f"{prefix}.{k}" in tensors:
            values[k] = tensors[f"{prefix}.{k}"]
