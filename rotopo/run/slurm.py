"""A fit in a SLURM job that is queued again goes on from what it has done."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from rotopo.errors import InputError
from rotopo.files import write_whole
from rotopo.run.checkpoints import kept_in, last_good
from rotopo.run.lightning import cluster_environment


@dataclass
class Job:
    """A command in a SLURM job: the same when SLURM starts the job again.

    Attributes:
        record: the folders in which its starts have kept checkpoints, a line each.
        resumed: the checkpoint that this start goes on from.
        requeue_signal: at which it is to be queued again; 0 where it is not.
    """

    record: Path
    resumed: Path | None = None
    requeue_signal: int = 0

    @classmethod
    def of_command(cls, number: str, root: Path, settings: str) -> Self:
        """A command of a job.

        Args:
            number: the job's.
            root: folder of its runs.
            settings: all that tells the command from others of the job.
        """
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        return cls(root / ".slurm" / f"{number}-{digest}")

    def resume(self) -> None:
        """Set ``resumed``, if the job was started again and there is something to go on from."""
        if not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            return
        folders = self.record.read_text("utf-8").splitlines() if self.record.exists() else []
        found = (last_good(Path(folder)) for folder in reversed(folders))
        self.resumed = next((path for path in found if path), None)
        where = f"goes on from {self.resumed}" if self.resumed else "begins anew: it kept nothing"
        rank_zero_info(f"This job was queued again: it {where}.")

    def remember(self, folder: Path) -> None:
        """Write down where this start keeps its checkpoints."""
        before = self.record.read_text("utf-8") if self.record.exists() else ""
        write_whole(self.record, f"{before}{folder.absolute()}\n")

    def queue_again(self) -> None:
        """Have SLURM start the job anew."""
        number = os.environ["SLURM_JOB_ID"]
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        if array:  # one of its tasks has the number of them all for its own
            number = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", number], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"rotopo: the job was not queued again: {error}.", file=sys.stderr)


class Requeue(Callback):
    """Writes down where a fit in a SLURM job keeps its checkpoints, so that the job, queued again,
    goes on from them; :class:`rotopo.run.interruption.Interruption` ends the fit in time.

    Args:
        job: the fit's command in its job.

    Attributes:
        signal: at which the job is to be queued again; 0 where it is not.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.signal = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check that all ranks go on from the same place.

        Raises:
            InputError: they do not find the same checkpoint.
        """
        first = trainer.strategy.broadcast(self.job.resumed)
        if not trainer.strategy.reduce_boolean_decision(first == self.job.resumed):
            raise InputError(
                "the ranks of this job do not find the same checkpoint to go on from: let "
                "trainer.default_root_dir be a folder that all nodes share."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        folder = kept_in(trainer)
        if folder is not None and "://" not in folder:
            if trainer.is_global_zero:
                self.job.remember(Path(folder))
            self.signal = self.job.requeue_signal


def take_over(trainer: Trainer, job: Job | None) -> None:
    """Keep Lightning from queueing a SLURM job again, and have ``job`` do it.

    Lightning would save inside its signal handler, in the midst of a step, and go on later from
    between its halves; of several ranks each would wait there for the others, wherever they are.
    And any later run in the same folder would go on from that checkpoint.
    """
    environment = cluster_environment(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        environment.auto_requeue = False
        if job is not None:
            job.requeue_signal = environment.requeue_signal or 0
