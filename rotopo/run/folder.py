"""Where a run writes: a folder of its own, whatever loggers it is given.

In ``default_root_dir/version_N`` lie, where the command has them: ``config.yaml`` (the settings),
``doctor.json``, ``hparams.yaml`` (versions and fingerprints), ``metrics.csv``, TensorBoard's
events, ``checkpoints/``, ``rounds/``, and what ``test`` and ``predict`` find out.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from rotopo.errors import InputError
from rotopo.run.lightning import is_trial

_NOT_YET = -1  # a number that no folder has


def root_of(setting: Any) -> Path:
    """The folder of a run's folder, from ``trainer.default_root_dir``.

    Raises:
        InputError: it is no folder of a file system.
    """
    root = str(setting or "runs")
    if "://" in root:
        raise InputError(
            f"trainer.default_root_dir is {root}: a run's folder lies in a file system of this "
            "machine; checkpoints alone can be kept elsewhere, by ModelCheckpoint's dirpath."
        )
    return Path(root).expanduser()


def folder_of(trainer: Trainer) -> Path:
    """A run's folder; all ranks ask together, and are told what the first one says."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunFolder:
    """``root/version_N``, made by the first rank when it is first asked for.

    Args:
        root: folder of this run's folder and others'.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number: int | None = None

    @property
    def number(self) -> int:
        """N of ``version_N``. Other ranks than the first know it once they were told."""
        if self._number is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._number = _make(self.root)
        return _NOT_YET if self._number is None else self._number

    @number.setter
    def number(self, number: int) -> None:
        self._number = number


def _make(root: Path) -> int:
    """Make the next folder; of runs that start at once each makes another, since one alone can make
    a folder that was not there.

    Raises:
        InputError: the file system does not allow it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        numbers = [path.name.removeprefix("version_") for path in root.glob("version_*")]
        number = max((int(n) for n in numbers if n.isdecimal()), default=-1) + 1
        while True:
            try:
                (root / f"version_{number}").mkdir()
                return number
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(
            f"trainer.default_root_dir: {error.filename or root} cannot be used: {error.strerror}."
        ) from error


class RunLogger(CSVLogger):
    """``metrics.csv`` and ``hparams.yaml`` in a run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        # What a killed run has logged stays, up to a few steps.
        super().__init__(folder.root, name="", flush_logs_every_n_steps=5)
        self.folder = folder

    @property
    def version(self) -> int:
        return self.folder.number


class RunBoard(TensorBoardLogger):
    """TensorBoard's events in a run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.root, name="")
        self.folder = folder

    @property
    def version(self) -> int:
        return self.folder.number


def loggers_in(folder: RunFolder, given: Any) -> list[Logger]:
    """A run's loggers.

    Lightning asks the first for the run's folder, for checkpoints too: so it is always one of ours.

    Args:
        folder: the run's.
        given: ``trainer.logger``. None and true are TensorBoard beside our table, false is our
            table alone, and a logger or several come after it.
    """
    if given is None or given is True:
        return [RunBoard(folder), RunLogger(folder)]
    others = given if isinstance(given, list) else [given]
    return [RunLogger(folder), *(one for one in others if isinstance(one, Logger))]


def refuse_to_replace(loggers: list[Logger]) -> None:
    """Refuse a table of the user's own where another run has one, which Lightning would delete.

    Raises:
        InputError: ``version`` of a CSVLogger names a folder that holds a table.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger) and not isinstance(logger, RunLogger):
            file = Path(logger.log_dir, "metrics.csv")
            if file.exists():
                raise InputError(
                    f"trainer.logger: CSVLogger would delete {file}, which another run has "
                    "written: leave version out, or name another folder."
                )


class ToldFolder(Callback):
    """Has all ranks know the run's folder, and each checkpoint name the run that wrote it.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not is_trial(trainer):
            self.folder.number = trainer.strategy.broadcast(self.folder.number)

    def state_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder.root.absolute() / f"version_{self.folder.number}")}
