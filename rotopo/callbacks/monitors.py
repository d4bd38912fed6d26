"""Settings that name a metric: refused where there is none of the name, obeyed where there is."""

import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rotopo.callbacks.learning_rate import LearningRate
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.run.lightning import callbacks_of, data_if_any


def follows_metric(scheduler: Any) -> bool:
    """Whether a learning-rate scheduler is stepped with a metric, as ``ReduceLROnPlateau``."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in positional for p in parameters)


class Monitors(Callback):
    """Refuses a ``monitor`` that no metric has, of callbacks and of the scheduler, before step 1.

    Names are not kept in a list: those under ``val/`` are what the sanity validation has seen,
    and the same callbacks log them under ``train/`` too, of sources and sets by the names that the
    data has; other callbacks of ours say theirs in ``metric_names``. Without a sanity validation
    the first step's names stand for it. A module or a callback of the user's own may log what it
    likes when it likes: with one in the run a name that is unknown is left to whoever monitors it,
    who looks for it when it is due.

    Also flattens names of checkpoints: ``{val/loss}`` would make a folder.
    """

    def __init__(self) -> None:
        self.validates = True
        self.checked = False
        self.first_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelCheckpoint):
                flatten(callback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be, whatever is logged.

        Raises:
            InputError: a monitor under ``val/`` in a run that does not validate, or under
                ``test/``.
        """
        data = data_if_any(trainer)
        self.checked = False
        self.validates = trainer.limit_val_batches != 0 and (
            data is None or not hasattr(data, "has") or data.has("validation")
        )
        for place, name in monitored(trainer):
            if name.startswith("test/"):
                raise InputError(
                    f"{place}.monitor is {name!r}: of the test pairs a fit knows nothing; take "
                    f"{'val/' + name.removeprefix('test/')!r}."
                )
            if name.startswith("val/") and not self.validates:
                raise InputError(
                    f"{place}.monitor is {name!r}: this run does not validate: set "
                    "data.validation, and trainer.limit_val_batches above 0."
                )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first_step = trainer.global_step  # now that a resumed run knows it

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self.checked and trainer.global_step > self.first_step:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare the monitors with the names that the run has.

        Raises:
            InputError: there is none of a name.
        """
        self.checked = True
        callbacks = callbacks_of(trainer)
        known = {*trainer.callback_metrics}
        pairs = {name for one in callbacks for name in getattr(one, "pair_metric_names", ())}
        stages = {"train": "train"} | ({"val": "validation"} if self.validates else {})
        data = data_if_any(trainer)
        for stage, split in stages.items():
            parts = data.pairs.parts if isinstance(data, PairwiseDataModule) else {}
            labels = parts[split].names if split in parts else []
            known |= {f"{stage}/{name}" for name in pairs}
            known |= {f"{stage}/{label}/{name}" for label in labels for name in pairs}
        known |= {name for one in callbacks for name in getattr(one, "metric_names", ())}
        if any(_is_the_users(part) for part in (module, *callbacks)):
            return
        rates = any(isinstance(one, LearningRate | LearningRateMonitor) for one in callbacks)
        for place, name in monitored(trainer):
            # Of each layer, or of each group of parameters: told apart only when they are logged.
            late = name.startswith("orthogonality/") or (rates and name.startswith("lr-"))
            if name not in known and not late:
                raise InputError(f"{place}.monitor is {name!r}: {unknown(name, known)}")


class MetricSchedules(Callback):
    """Steps a scheduler that follows a metric as soon as the metric is there: one under ``val/``
    after each validation, any other at the end of each epoch.

    Before checkpoints are written, so that they hold what it did. Lightning would step it after
    them, leave it out when it goes on from one, and at the end of an epoch without a validation
    show it the last one's value again.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._step(trainer, after_validation=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step(trainer, after_validation=False)

    def _step(self, trainer: Trainer, after_validation: bool) -> None:
        for config in trainer.lr_scheduler_configs:
            name = config.monitor
            if name is None or name.startswith("val/") != after_validation:
                continue
            known = trainer.callback_metrics
            if name not in known:
                raise InputError(f"model.scheduler.monitor is {name!r}: {unknown(name, known)}")
            scheduler: Any = config.scheduler
            scheduler.step(known[name])


def monitored(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Settings that name a metric without which they cannot do, and the metric."""
    for callback in callbacks_of(trainer):
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and getattr(callback, "strict", True):
            yield f"trainer.callbacks ({type(callback).__name__})", name
    for config in trainer.lr_scheduler_configs:
        if config.monitor is not None:
            yield "model.scheduler", config.monitor


def unknown(name: str, known: Any) -> str:
    """What to say of a name that no metric has."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"no metric of this run has that name.{guess} There are {', '.join(names)}."


def flatten(checkpoint: ModelCheckpoint) -> None:
    """Let metrics in a checkpoint's name make no folders: ``{val/loss:.2f}`` becomes
    ``val_loss=0.69``."""
    template = checkpoint.filename
    if not template or not checkpoint.auto_insert_metric_name:
        return
    if not any("/" in name for name in re.findall(r"\{([^}:]*)", template)):
        return
    checkpoint.auto_insert_metric_name = False
    checkpoint.filename = re.sub(
        r"\{([^}:]*)", lambda m: f"{m[1].replace('/', '_')}={m[0]}", template
    )


def _is_the_users(part: object) -> bool:
    return type(part).__module__.partition(".")[0] not in ("rotopo", "lightning")
