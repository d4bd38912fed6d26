"""Checkpoints: what a run writes to go on from, and what others read of it."""

from pathlib import Path
from typing import Any

import torch

from rotopo.errors import InputError


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU; only tensors and plain values are read, no pickled object.

    Args:
        path: as ``--ckpt_path`` takes it.

    Raises:
        InputError: there is none, or it is no checkpoint of ours.
    """
    if not path.exists():
        raise InputError(f"ckpt_path: there is no checkpoint {path}.")
    if path.is_dir():
        from rotopo import checkpoint_folders  # slow to import, and few checkpoints are folders

        return checkpoint_folders.read(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "rotopo" not in checkpoint:
        raise InputError(f"ckpt_path: {path} was not written by rotopo.")
    return checkpoint
