"""Settings -> module and data, without a run."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from rotopo.data.module import PairwiseDataModule
from rotopo.lightning_cli import RotopoCLI, built
from rotopo.run.slurm import Job
from rotopo.training import PairwiseModule


class _Parts(RotopoCLI):
    """Module and datamodule of a run's settings, whose Trainer does nothing."""

    def _job_of_fit(self) -> Job | None:
        return None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        self.model.trainer = trainer  # which modules ask for their rank when they load
        return trainer

    def carry_out(self, subcommand: str) -> None:
        pass


class _Described(_Parts):
    """The same of any settings, of which the Trainer's own parts are kept and not built."""

    def before_instantiate_classes(self) -> None:
        settings = self._settings()
        self.described = settings.clone()
        settings.ckpt_path = None
        for part in ("callbacks", "plugins", "profiler"):
            settings.trainer[part] = None
        settings.trainer.strategy, settings.trainer.logger = "auto", False
        super().before_instantiate_classes()


def parts(
    *files: str | Path,
) -> tuple[PairwiseModule, PairwiseDataModule, dict[str, Any]]:
    """Module and datamodule of a run of ``rotopo fit``, and all of its settings.

    Args:
        files: of settings, or their texts, the later ones before the earlier: a checkpoint's
            settings as JSON, the ``config.yaml`` in a run's folder.

    Raises:
        SystemExit: as :func:`rotopo.lightning_cli.run`.
    """
    # Of the run's own Trainer, and perhaps not possible here.
    without = ("callbacks=null", "strategy=auto", "logger=false", "plugins=null", "profiler=null")
    options = ["--ckpt_path=null", *(f"--trainer.{setting}" for setting in without)]
    cli = built(_Parts, ["fit", *(f"--config={file}" for file in files), *options])
    return cli.model, cli.datamodule, cli.settings


def described(args: list[str]) -> tuple[PairwiseModule, PairwiseDataModule, Namespace]:
    """Module and datamodule of what would be given to ``rotopo fit``, and all of its settings.

    Nothing is loaded, and the Trainer is not built.

    Raises:
        SystemExit: as :func:`rotopo.lightning_cli.run`.
    """
    cli = built(_Described, ["fit", *args])
    return cli.model, cli.datamodule, cli.described
