"""A run says where it is: its folder and what trains, then why it ended and how to go on."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn

from rotopo.endings import ended, say
from rotopo.run.folder import folder_of
from rotopo.run.interruption import Interruption
from rotopo.run.lightning import callbacks_of, cluster_environment, data_if_any, is_trial
from rotopo.run.steps import works_in_steps_only


class Whereabouts(Callback):
    """Prints a fit's first line and its last ones, on the first rank; of one that a signal ended it
    has the signal's line say what is kept.

    Args:
        by_command: whether the command's own checkpoints are all that it needs to go on.
    """

    def __init__(self, by_command: bool) -> None:
        self.by_command = by_command
        self.first_step: int | None = None  # None until training begins
        self.saved_step = -1
        self.folder = Path()
        self.why = ""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.first_step, self.saved_step = None, -1

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        where = "A trial, which writes nothing"
        if not is_trial(trainer):
            where = str(folder_of(trainer))  # asked on every rank
            self.folder = Path(where)
        if trainer.is_global_zero:
            start = f", from {trainer.ckpt_path}" if trainer.ckpt_path else ""
            print(f"{where}: {what_trains(trainer, pl_module)}{start}.", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.first_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.why = why(trainer)  # as long as the last metrics are there

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self.saved_step = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        stop = ended(exception)
        if stop is None:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            stop.advice = self._after_a_signal(trainer, pl_module)
        else:
            stop.advice = "before its end: nothing of it is kept."
        if not self.by_command:
            say(str(stop))

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        place = "A trial, which wrote nothing" if is_trial(trainer) else self.folder
        how_far = f"ended after step {trainer.global_step} ({self.why})"
        if self.first_step is None:
            how_far = f"nothing was left to train at step {trainer.global_step} ({why(trainer)})"
        print(f"{place}: {how_far}.")
        checkpoint = last_checkpoint(trainer)
        if checkpoint is None:
            if not is_trial(trainer):
                print("No checkpoint was kept.")
            return
        of = f" (of step {self.saved_step})" if self.saved_step != trainer.global_step else ""
        if self.by_command:
            print(f"Next: {self._next(trainer, checkpoint)}{of}", flush=True)
        else:
            print(f"Checkpoint: {checkpoint}{of}", flush=True)

    def _next(self, trainer: Trainer, checkpoint: str) -> str:
        data = data_if_any(trainer)
        if data is not None and data.has("test"):
            return f"rotopo test --ckpt_path {shlex.quote(checkpoint)}"
        return f"rotopo export --run {shlex.quote(str(self.folder))} --output my_model"

    def _after_a_signal(self, trainer: Trainer, module: Any) -> str:
        """What is kept of a fit that a signal ended, and what to type in order to go on."""
        if self.first_step is None:
            start = trainer.ckpt_path
            what = f"the same command goes on from {start}" if start else "there is nothing to keep"
            return f"before the first step: {what}."
        found = next((c for c in callbacks_of(trainer) if isinstance(c, Interruption)), None)
        kept = (found.kept if found else None) or last_checkpoint(trainer)
        step = f"after step {trainer.global_step}"
        if kept is None:
            return f"{step}: nothing is kept, since the run keeps no checkpoints."
        of = f" of step {self.saved_step}" if self.saved_step != trainer.global_step else ""
        return f"{step}, checkpoint{of} kept; go on with: {self._way_on(trainer, module, kept)}"

    def _way_on(self, trainer: Trainer, module: Any, checkpoint: str) -> str:
        option = f"--ckpt_path {shlex.quote(checkpoint)}"
        environment = cluster_environment(trainer)
        started = environment is not None and environment.creates_processes_externally
        if not self.by_command or (started and trainer.world_size > 1):
            return f"the same command and {option}" if self.by_command else checkpoint
        # All settings are in the checkpoint, except the consent to run a model's own code.
        config = module.model_config
        trust = f" --model.{config.setting}.trust_remote_code true"
        return f"rotopo fit {option}" + trust * bool(config.trust_remote_code)


def what_trains(trainer: Trainer, module: Any) -> str:
    """Class, model, and how many of its parameters train."""
    config = module.model_config
    name = config.path.rstrip("/").rpartition("/")[2]
    adapter = getattr(config, "adapter", None)
    by = f" by {type(adapter).__name__}" if adapter is not None else ""
    parameters = list(module.parameters())
    if works_in_steps_only(trainer):  # each rank's shares have numbers of their own
        return f"{type(module).__name__} on {name}{by}"
    every = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    share = f"{trained:,} of {every:,} parameters ({trained / every:.3%}) train{by}"
    return f"{type(module).__name__} on {name}, {share}"


def last_checkpoint(trainer: Trainer) -> str | None:
    """The last one that a run has kept, or of those that keep the best ones the best."""
    keepers = [k for k in trainer.checkpoint_callbacks if isinstance(k, ModelCheckpoint)]
    found = [k.last_model_path for k in keepers] + [k.best_model_path for k in keepers]
    return next((path for path in found if path), None)


def why(trainer: Trainer) -> str:
    """Which setting has ended a fit, or has left nothing to train."""
    found = next(_reasons(trainer), "a callback ended it")
    few = trainer.overfit_batches  # type: ignore[attr-defined]
    return f"{found}; on overfit_batches {few} alone" if few else found


def _reasons(trainer: Trainer) -> Iterator[str]:
    if is_trial(trainer):
        yield "trainer.fast_dev_run"
    if trainer.num_training_batches == 0:
        yield "no training batches"
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        yield f"trainer.max_steps {trainer.max_steps} reached"
    epochs: Any = trainer.fit_loop.epoch_progress.current
    most = trainer.max_epochs
    if most not in (None, -1) and epochs.processed >= most:
        yield f"trainer.max_epochs {most} reached"
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            yield _early(callback, float(trainer.callback_metrics[callback.monitor]))
        elif isinstance(callback, Timer):
            left = callback.time_remaining()
            if left is not None and left <= 0:
                yield "trainer.max_time reached"


def _early(callback: EarlyStopping, value: float) -> str:
    best, checks = f"{float(callback.best_score):.4g}", callback.wait_count
    what = {
        EarlyStoppingReason.PATIENCE_EXHAUSTED: f"no better than {best} in {checks} checks",
        EarlyStoppingReason.STOPPING_THRESHOLD: f"past {callback.stopping_threshold}, as asked for",
        EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"worse than {callback.divergence_threshold}",
        EarlyStoppingReason.NON_FINITE_METRIC: "not finite",
    }
    return f"early stopping: {callback.monitor} is {value:.4g}, {what[callback.stopping_reason]}"
