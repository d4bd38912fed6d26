"""ModelCheckpoint's names and folders: no run's checkpoints are written over, removed, or taken for
another's."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rotopo.errors import InputError
from rotopo.run.lightning import counts_versions, is_trial


def flatten_names(callbacks: Iterable[Callback]) -> None:
    """Have a metric's slash make no folder: ``{epoch}-{val/loss:.3f}`` is written as
    ``epoch=0-val_loss=0.700``."""
    for one in callbacks:
        if not (isinstance(one, ModelCheckpoint) and one.auto_insert_metric_name and one.filename):
            continue
        metrics = re.findall(r"\{([^:}]*)", one.filename)
        if any("/" in name for name in metrics):
            for name in set(metrics):
                flat = f"{name.replace('/', '_')}{one.CHECKPOINT_EQUALS_CHAR}"
                one.filename = re.sub(rf"(\{{{re.escape(name)}[:}}])", rf"{flat}\1", one.filename)
            one.auto_insert_metric_name = False


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` in a run that is given no ModelCheckpoint.

    It is written when the file of Lightning's default would be, at the end of each epoch or after
    each validation within one, and also at the end of training.
    """

    def __init__(self) -> None:
        super().__init__(filename=self.CHECKPOINT_NAME_LAST)
        self._step = -1

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self._step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._step != trainer.global_step and not is_trial(trainer):
            self.best_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            trainer.save_checkpoint(self.best_model_path)


def with_last(callbacks: list[Callback], enabled: bool | None) -> list[Callback]:
    """A run's callbacks, with :class:`LastCheckpoint` where none of them keeps checkpoints.

    Args:
        callbacks: the user's.
        enabled: ``trainer.enable_checkpointing``.
    """
    if enabled is False or any(isinstance(one, Checkpoint) for one in callbacks):
        return callbacks
    return [*callbacks, LastCheckpoint()]


class OwnCheckpoints(Callback):
    """Keeps a fit's checkpoints apart from those of other runs.

    A ``dirpath`` of ModelCheckpoint that holds checkpoints is for a fit that goes on from there. A
    fit that goes on leaves what it finds as it is: each of its starts has a best and a last one of
    its own.

    Args:
        callbacks: the user's.
        goes_on: whether a checkpoint is named to go on from.

    Raises:
        InputError: a fit would keep its checkpoints among another run's, or write over them.
    """

    def __init__(self, callbacks: Iterable[Callback], goes_on: bool) -> None:
        own = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.dirpath]
        # Before Lightning gives one to each. Once looked at, what lies there is the run's own.
        self._left = {str(one.dirpath): counts_versions(one) for one in own}
        self.goes_on = goes_on

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit" or is_trial(trainer):
            return
        for dirpath, counts in self._left.items():
            if not counts:
                raise InputError(
                    "trainer.callbacks: ModelCheckpoint with enable_version_counter: false and a "
                    f"dirpath, {dirpath}, would write over what an earlier start has kept there: "
                    "leave one of the two out."
                )
        if not self.goes_on:
            self._look(trainer, ())

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            states = checkpoint["callbacks"].values()
            self._look(trainer, [state.get("dirpath") for state in states])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if is_trial(trainer):
            return
        self._look(trainer, ())  # if no checkpoint was found
        for keeper in trainer.checkpoint_callbacks:
            if isinstance(keeper, ModelCheckpoint):
                keeper.best_k_models, keeper.best_model_score = {}, None
                keeper.best_model_path = keeper.kth_best_model_path = keeper.last_model_path = ""

    def _look(self, trainer: Trainer, of_this_fit: Collection[str | None]) -> None:
        """Refuse folders with checkpoints, except those of the fit that goes on."""
        left, self._left = self._left, {}
        start = Path(str(trainer.ckpt_path)).resolve()
        others = [
            dirpath
            for dirpath in left
            if "://" not in dirpath
            and dirpath not in of_this_fit
            and Path(dirpath) not in start.parents
        ]
        taken = None
        if trainer.is_global_zero:
            taken = next((one for one in others if any(Path(one).rglob("*.ckpt"))), None)
        taken = trainer.strategy.broadcast(taken)
        if taken is not None:
            raise InputError(
                f"trainer.callbacks: ModelCheckpoint's dirpath, {taken}, holds checkpoints of "
                "another run: name another folder, leave dirpath out (each run's folder has one "
                "for its checkpoints), or go on from one of them with --ckpt_path."
            )
