"""Checkpoints: written whole, read with care, and refused with the name of the last good one."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from rotopo.errors import InputError
from rotopo.files import full_disk, sha256, unfinished, writing_whole
from rotopo.run import checkpoint_folders
from rotopo.run.checkpoint_folders import REST

_ZIP = b"PK\x03\x04"
# What a fit needs to go on, and what every checkpoint of ours has.
_TO_GO_ON = ("optimizer_states", "lr_schedulers", "callbacks")
_ALWAYS = ("state_dict", "random_states", "loops", "global_step")


def read(path: Path, mmap: bool = True, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint, on the CPU; only tensors and plain values are read, no pickled object.

    Args:
        path: as ``--ckpt_path`` takes it.
        mmap: leave the tensors in the file until they are looked at.
        optimizers: read their states too, of a folder; a file's stay in it until looked at.

    Raises:
        InputError: there is none, or it is torn, damaged or none of ours; the message names the
            last good one beside it.
    """
    checkpoint = check(path, mmap=mmap)
    if path.is_dir():
        return checkpoint_folders.read(path, checkpoint, parameters=None if optimizers else ())
    return checkpoint


def check(path: Path, resume: bool = False, mmap: bool = True) -> dict[str, Any]:
    """As :func:`read`, but of a folder without the tensors, which the ranks share.

    Args:
        path: as ``--ckpt_path`` takes it.
        resume: whether it also has to hold all that a fit needs to go on.
        mmap: leave the tensors in the file until they are looked at.
    """
    try:
        return _verified(path, resume, mmap)
    except InputError as error:
        good = last_good(path.parent, "*.ckpt")
        advice = f"the last good one here is {good}" if good else f"{path.parent} holds no good one"
        raise InputError(f"ckpt_path: {error} ({advice})") from error


def last_good(folder: Path, pattern: str = "**/*.ckpt") -> Path | None:
    """The checkpoint of the most steps in a folder that a run can go on from; of several the
    newest. None if there is none."""
    found = []
    # A folder that was about to be replaced when its run was killed is still there, aside.
    for path in (*folder.glob(pattern), *folder.glob(pattern.replace("*.ckpt", ".*.ckpt.old"))):
        try:
            found.append((_opened(path, True)["global_step"], path.stat().st_mtime_ns, path))
        except (InputError, OSError):  # removed by another process meanwhile, or not ours to read
            continue
    for _, _, path in sorted(found, reverse=True):
        try:
            _verified(path, True)
        except InputError:
            continue
        return path
    return None


def _verified(path: Path, resume: bool, mmap: bool = True) -> dict[str, Any]:
    """As :func:`_opened`, with all checksums compared, which torch does not; a folder's by the
    first rank alone."""
    checkpoint = _opened(path, resume, mmap)
    for name, value in checkpoint.get("shares", {}).items():
        if getattr(rank_zero_only, "rank", 0) == 0 and sha256(path / name) != value:
            raise InputError(f"{path} is damaged: the checksum of {name} is wrong.")
    try:
        with zipfile.ZipFile(_zip_of(path)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever zipfile makes of other bytes
        raise InputError(f"{path} is damaged: {_cause(error)}.") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {damaged} is wrong.")
    return checkpoint


def _opened(path: Path, resume: bool, mmap: bool = True) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"there is no checkpoint {path}.")
    file = _zip_of(path)
    if not file.is_file():
        raise InputError(f"{path} is a folder without {file.name}, which no checkpoint is.")
    with file.open("rb") as stream:
        start = stream.read(len(_ZIP))
    if not start:
        raise InputError(f"{path} is empty.")
    if start != _ZIP:
        raise InputError(f"{path} is no checkpoint.")
    try:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("its end is missing")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is torn or damaged: {error}.") from error
    except Exception as error:  # whatever torch and its unpickler make of other bytes
        raise InputError(
            f"{path} is damaged, or holds more than tensors and plain values: {_cause(error)}."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("rotopo"), dict):
        raise InputError(f"{path} was not written by rotopo.")
    for name in checkpoint.get("shares", {}):
        if not (path / name).is_file():
            raise InputError(f"{path} is torn: its {name} is missing.")
    missing = [name for name in _ALWAYS + _TO_GO_ON * resume if name not in checkpoint]
    if missing:
        raise InputError(f"{path} holds no {' and no '.join(missing)}: a fit cannot go on from it.")
    return checkpoint


def _zip_of(path: Path) -> Path:
    """The file, or the file in a folder that holds all but the shared tensors."""
    return path / REST if path.is_dir() else path


def _cause(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0] or type(error).__name__


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that it is whole or not there, and reads none that is neither.

    Lightning's own writes into the system's folder for temporary files and moves the file from
    there, which is copying it to its final name where that is another file system; nothing makes
    sure that it is on the disk. Paths with a protocol, as of object stores, are still left to it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if get_protocol(str(path)) != "file":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with writing_whole(path) as stream:
                torch.save(checkpoint, stream)
            for left in unfinished(path):  # by killed processes: a checkpoint has one writer
                left.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch's own has the disk's behind it
            full = full_disk(error)
            if full is None:
                raise
            raise disk_is_full(path, full, path.parent) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As :func:`read`, whatever the arguments."""
        if get_protocol(str(path)) != "file":
            return super().load_checkpoint(path, weights_only=True)
        return read(Path(path), mmap=False)


def disk_is_full(file: Path | None, error: OSError, folder: Path | None) -> InputError:
    """What a user is told when a file cannot be written.

    Args:
        file: the file, if it is known.
        error: what the system says.
        folder: the run's checkpoints, if it keeps any.
    """
    place = file or error.filename or "a file of the run"
    return InputError(f"{place} cannot be written ({error.strerror}): make room; {way_on(folder)}.")


def way_on(folder: Path | None) -> str:
    """The advice to go on from the last good checkpoint of a folder, if there is one."""
    good = last_good(folder) if folder else None
    return f"go on with --ckpt_path {good}" if good else "there is no checkpoint to go on from"


def kept_in(trainer: Trainer) -> str | None:
    """Where a run keeps its checkpoints, if it does."""
    keeper = trainer.checkpoint_callback
    return str(keeper.dirpath) if isinstance(keeper, ModelCheckpoint) else None
