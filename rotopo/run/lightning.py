"""Every private name of Lightning's Trainer that is leant on, and what its types leave out.

Each function says why the public interface does not do. A release of Lightning that moves one of
the names fails in ``tests/run/test_lightning.py``, which says which; until then an upper bound in
pyproject.toml keeps such a release out.
"""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from rotopo.data.module import PairwiseDataModule


def data_of(trainer: Trainer) -> "PairwiseDataModule":
    """The data of a run. Lightning's type has no such attribute; the Trainer does."""
    return trainer.datamodule  # type: ignore[attr-defined]


def data_if_any(trainer: Trainer) -> "PairwiseDataModule | None":
    """As :func:`data_of`; None for a run on loaders alone."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a run. Lightning's type has no such attribute; the Trainer does."""
    return trainer.callbacks  # type: ignore[attr-defined]


def counts_versions(keeper: ModelCheckpoint) -> bool:
    """Whether a checkpoint whose name is taken gets another, ``last-v1.ckpt``, and the one that is
    there stays. Told nowhere else once it is set."""
    return keeper._enable_version_counter


def is_hidden(trainer: Trainer) -> bool:
    """Whether this process shows no progress: a rank but the first, or without a progress bar."""
    return not trainer.is_global_zero or trainer.progress_bar_callback is None


def is_trial(trainer: Trainer) -> bool:
    """Whether it is ``fast_dev_run``, of which nothing is logged or kept. Lightning's type has no
    such attribute; the Trainer does."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer that a module is attached to; ``module.trainer`` raises where it is to none."""
    return module._trainer


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """How the ranks were started. Which environment Lightning has found is told nowhere else."""
    return trainer._accelerator_connector.cluster_environment


def leave_signals(trainer: Trainer) -> None:
    """Have Lightning take no signals. Its handler of SIGTERM waits, inside itself, for the other
    ranks wherever they are, and no setting leaves it out."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def remake_loaders_every_epoch(trainer: Trainer) -> None:
    """Have the training loader made anew for every epoch: a setting of the Trainer's constructor,
    which a callback learns too late for."""
    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]


def divide_among_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Have every rank hold a share of each weight. The constructor takes a number, which nobody
    knows there: Lightning's own choice for it is the number of nodes."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def talk_through(strategy: ModelParallelStrategy, backend: str) -> None:
    """Name the backend by which ranks talk, once the device is known; the constructor is too
    early for that."""
    strategy._process_group_backend = backend


def forget_train_loader(trainer: Trainer) -> None:
    """Let the training loader be set up again.

    Asking for ``estimated_stepping_batches`` sets it up before Lightning has restored the position
    in the epoch, and it is not set up again for that: a resumed run would start the epoch over.
    """
    trainer.fit_loop._combined_loader = None


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a run that has not been interrupted would validate after the batch that is done.

    Lightning asks so itself, within its training loop, and only there.
    """
    loop = trainer.fit_loop
    if not loop.epoch_loop._should_check_val_epoch():
        return False
    # An epoch's number of batches may be the next one's by now, if a selector chose its rows.
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_interval == 1:
        return loop.epoch_loop.batch_progress.is_last_batch
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def without_wrappers(name: str) -> str:
    """A parameter's or module's name in the module, without what FSDP1 puts around its units."""
    return name.replace("_fsdp_wrapped_module.", "")
