"""Checkpoints: written whole, read with care, and refused with the name of the last good one."""

import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rotopo.errors import InputError
from rotopo.files import full_disk, sha256, unfinished, writing_whole

if TYPE_CHECKING:
    from rotopo.slurm import Job

REST = "meta.pt"  # of a checkpoint that is a folder; by it Lightning tells such a folder, too
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
        from rotopo import checkpoint_folders  # slow to import, and few checkpoints are folders

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


@contextmanager
def replacing(path: Path) -> Iterator[None]:
    """Put a checkpoint, if there is one, aside while another gets its name, where
    :func:`last_good` finds it."""
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


def checkpoint_folder(trainer: Trainer) -> str | None:
    """Where a run keeps its checkpoints, if it does."""
    keeper = trainer.checkpoint_callback
    return str(keeper.dirpath) if isinstance(keeper, ModelCheckpoint) else None


class Interruption(Callback):
    """On SIGTERM a fit ends with the optimiser step, or the batch of a validation, that is at hand,
    and keeps what it has done, if it keeps checkpoints.

    So it does on the signal at which its SLURM job is to be queued again, and has SLURM do that
    (:class:`rotopo.slurm.Job`). Until the first step there is nothing to keep, and signals end the
    process as they end any other.

    Lightning would end in the midst of a step and keep nothing; and of several ranks each would
    wait for the others inside its signal handler, wherever they are.
    """

    def __init__(self) -> None:
        self.asked = 0  # by this signal, the first
        self._job: Job | None = None
        # The loops as they were when the validation at hand was about to begin.
        self._before_validation: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._job = getattr(trainer, "slurm_job", None)
        if self._job is None:
            return
        first = trainer.strategy.broadcast(self._job.resumed)
        if not trainer.strategy.reduce_boolean_decision(first == self._job.resumed):
            raise InputError(
                "the ranks of this job do not find the same checkpoint to go on from: let "
                "trainer.default_root_dir be a folder that all nodes share."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        numbers: list[int] = [signal.SIGTERM]
        folder = checkpoint_folder(trainer)
        if self._job is not None and folder is not None and "://" not in folder:
            if trainer.is_global_zero:
                self._job.remember(Path(folder))
            if self._job.requeue_signal:
                numbers.append(self._job.requeue_signal)
        if threading.current_thread() is threading.main_thread():
            # The Trainer puts the handlers that it has found back when it ends.
            for number in numbers:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.asked = self.asked or number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._end_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._before_validation = loops = deepcopy(trainer.fit_loop.state_dict())
            # As a checkpoint of the batch before has it: it is behind that batch that a run which
            # goes on validates, see PairwiseModule.on_train_start.
            for part in ("total", "current"):
                loops["epoch_loop.batch_progress"][part]["completed"] -= 1

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._before_validation is not None:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._before_validation = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if self._before_validation is not None:
            checkpoint["loops"]["fit_loop"] = self._before_validation

    def _end_if_asked(self, trainer: Trainer) -> None:
        any_rank = trainer.strategy.reduce_boolean_decision
        if not any_rank(bool(self.asked), all=False):
            return
        job = self._job
        requeue = job is not None and any_rank(self.asked == job.requeue_signal > 0, all=False)
        folder = checkpoint_folder(trainer)
        if folder is not None:
            trainer.save_checkpoint(f"{folder}/last-interrupted.ckpt")
        if not (requeue and job):
            raise SIGTERMException(128 + signal.SIGTERM)
        if trainer.is_global_zero:
            job.queue_again()
        trainer.strategy.barrier()  # SLURM may end all ranks when one has ended
        raise SIGTERMException(128 + job.requeue_signal)
