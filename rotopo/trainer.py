"""The Trainer of a script: Lightning's, with what the command gives each run."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from lightning import pytorch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO

from rotopo.callbacks.monitors import Monitors
from rotopo.callbacks.pair_scores import PairScores
from rotopo.callbacks.progress import ProgressLine
from rotopo.callbacks.results import results_table
from rotopo.progress import screen
from rotopo.run.checkpoints import WholeCheckpointIO
from rotopo.run.folder import RunFolder, ToldFolder, loggers_in, refuse_to_replace, root_of
from rotopo.run.keeping import OwnCheckpoints, flatten_names, with_last
from rotopo.run.lightning import callbacks_of
from rotopo.run.wandb import WandbIds
from rotopo.run.whereabouts import Whereabouts


class _Sayings(logging.Filter):
    """Leaves out what contains one of some texts. Equal ones are one filter, however often it is
    added."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(text in said for text in self.texts)


# What libraries log that is of no use, by the loggers' names.
_SAYINGS = {
    "lightning.pytorch.utilities.rank_zero": _Sayings(
        "Tip: For seamless cloud",  # an advertisement
        "GPU available: ",  # that one is there and not used is a warning, which stays
        "TPU available: False",
        "`Trainer.fit` stopped: ",  # Whereabouts says which setting ended a fit
        "Loading `train_dataloader` to estimate",  # what it was going to do anyway
    ),
    "lightning.fabric.utilities.seed": _Sayings("Seed set to"),  # the run's settings have it
    # Said when a checkpoint is written: of what it holds, not of how it is read.
    "lightning.pytorch.trainer.connectors.checkpoint_connector": _Sayings(
        "`weights_only` was not set"
    ),
}


class Telling(pytorch.Trainer):
    """Lightning's Trainer, which tells what a test or a validation has found in a table of its own:
    rounded, by plain names, within 80 columns."""

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Test a model on the test split, and tell what was found.

        Args:
            model: what the Trainer works on.
            dataloaders: in the place of a datamodule.
            ckpt_path: the checkpoint to take the weights from.
            verbose: print what is found.
            datamodule: the data.
            weights_only: load nothing but tensors and plain values.
        """
        found = super().test(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        return self._told("test", found, verbose)

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Test a model on the validation split, and tell what was found.

        Args:
            model: what the Trainer works on.
            dataloaders: in the place of a datamodule.
            ckpt_path: the checkpoint to take the weights from.
            verbose: print what is found.
            datamodule: the data.
            weights_only: load nothing but tensors and plain values.
        """
        found = super().validate(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        return self._told("val", found, verbose)

    def _told(self, stage: str, found: Any, verbose: bool) -> Any:
        if verbose and self.is_global_zero and any(found):
            scores = [one for one in callbacks_of(self) if isinstance(one, PairScores)]
            told = set().union(*(one.told for one in scores))
            print(results_table(stage, found, told), flush=True)
        return found


class Trainer(Telling):
    """Lightning's Trainer for a script without the command line.

    As under the command a run has a folder of its own, ``default_root_dir/version_N``, with
    ``metrics.csv``, TensorBoard's events and checkpoints that are written whole; a ``monitor`` that
    no metric has is refused before the first step; and rotopo's samplers, which know the ranks, are
    left in place. With Lightning's own Trainer a module trains to the same weights.

    What only the command knows stays out: checkpoints hold no settings, so that a command goes on
    from them only with ``--config``; and nothing seeds, catches errors or takes SLURM's signals.

    Args:
        default_root_dir: folder of the runs' folders.
        logger: as of Lightning's: None and true are TensorBoard beside ``metrics.csv``, false that
            table alone, and others come beside it.
        callbacks: as of Lightning's.
        plugins: as of Lightning's.
        **settings: of Lightning's Trainer.

    Raises:
        InputError: a folder that cannot be used, or in which another run's files would be replaced.
    """

    def __init__(
        self,
        *,
        default_root_dir: str | Path = "runs",
        logger: Logger | Sequence[Logger] | bool | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        plugins: Any = None,
        **settings: Any,
    ) -> None:
        folder = RunFolder(root_of(default_root_dir))
        quiet()
        loggers = loggers_in(folder, list(logger) if isinstance(logger, Sequence) else logger)
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or ())
        flatten_names(given)
        if plugins is None:
            plugins = ()
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO())
        self._own = OwnCheckpoints(given, goes_on=False)
        always = [ToldFolder(folder), self._own, WandbIds(loggers)]
        always += [Whereabouts(by_command=False), Monitors()]
        given = with_last(given, settings.get("enable_checkpointing"))
        super().__init__(
            default_root_dir=root_of(default_root_dir),
            logger=loggers,
            callbacks=[
                *always,
                *shows_progress(given, settings.get("enable_progress_bar")),
                *given,
            ],
            plugins=plugins,
            **{
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 1,
                "enable_model_summary": False,
            }
            | settings,
        )
        if self.is_global_zero:
            refuse_to_replace(self.loggers)

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """As Lightning's."""
        self._own.goes_on = ckpt_path is not None
        loaders = train_dataloaders, val_dataloaders
        super().fit(model, *loaders, datamodule, ckpt_path, weights_only)


def shows_progress(given: Sequence[Callback], enabled: bool | None) -> list[Callback]:
    """The progress bar of a run, unless there is one already, or is to be none."""
    has_one = any(isinstance(callback, ProgressBar) for callback in given)
    return [] if has_one or enabled is False else [ProgressLine()]


def quiet() -> None:
    """Leave out what Lightning and others say that is of no use to whoever runs rotopo."""
    # The run's folder already holds config.yaml when the CSV logger looks at it.
    warnings.filterwarnings("ignore", "Experiment logs directory")
    # A fit that goes on keeps its checkpoints in a folder of its own.
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    # A run without validation is nothing to warn about.
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    # What does not train is: a reference beside the policy, for one.
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start")
    # What libraries deprecate in one another is nothing that a user can mend.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`")
    warnings.filterwarnings("ignore", "`loftq_config` specified but will be ignored")
    # Our callbacks' values are those of all ranks already.
    warnings.filterwarnings("ignore", r"It is recommended to use `self\.log")
    for name, sayings in _SAYINGS.items():
        logging.getLogger(name).addFilter(sayings)
    if not screen.is_terminal:  # bars of others, which a log would have as one endless line
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
