"""How far a run is: one line in a terminal, plain lines in a log."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from rotopo.progress import OFTEN, Part, Progress, between, duration, screen
from rotopo.run.steps import begins_step

_SELDOM = 60.0  # seconds from one line of a log to the next at most
# Names on the line, and their ranks: see Part.
_SHORT = {"loss": ("loss", 1), "rewards/margin": ("margin", 3), "rewards/accuracy": ("acc", 4)}


@dataclass
class _Training:
    """A training, from where this process has begun it.

    Attributes:
        first: steps that were done before.
        steps: how many there are at the end; 0 where nobody knows.
        pairs: of all ranks, so far.
        paused: seconds of it in validations.
        shown: the last step that had a line.
        shown_at: when.
    """

    first: int
    steps: int
    began: float = field(default_factory=time.monotonic)
    pairs: int = 0
    paused: float = 0.0
    shown: int = -1
    shown_at: float = -math.inf

    def whole(self, step: int) -> float:
        """Seconds that it takes in all, as far as can be told at a step."""
        elapsed = time.monotonic() - self.began
        return elapsed / max(step - self.first, 1) * max(self.steps - self.first, 1)

    def parts(self, trainer: Trainer) -> list[Part]:
        """The line of the last step."""
        step, elapsed = trainer.global_step, time.monotonic() - self.began
        return training_line(
            step,
            max(self.steps, step) if self.steps else 0,
            trainer.current_epoch + 1,
            trainer.max_epochs or -1,
            trainer.progress_bar_metrics,
            self.pairs / max(elapsed - self.paused, 1e-9),
            elapsed,
            elapsed / max(step - self.first, 1),
        )


def training_line(
    step: int,
    steps: int,
    epoch: int,
    epochs: int,
    metrics: Mapping[str, Any],
    rate: float,
    elapsed: float,
    per_step: float,
) -> list[Part]:
    """The line of a training's step.

    Args:
        step: optimiser steps that are done.
        steps: how many there are; 0 where nobody knows.
        epoch: at work on, from 1.
        epochs: how many there are; below 1 where nobody knows.
        metrics: of the progress bar, by their names in full.
        rate: pairs per second.
        elapsed: seconds since training began.
        per_step: seconds.
    """
    parts = [Part(f"step {step}/{steps}" if steps else f"step {step}")]
    if epochs != 1:
        parts.append(
            Part(f"epoch {min(epoch, epochs)}/{epochs}" if epochs > 0 else f"epoch {epoch}", 6)
        )
    parts += _values(metrics, "train")
    if rate:
        parts.append(Part(f"{rate:.1f} pairs/s" if rate < 10 else f"{rate:.0f} pairs/s", 5))
    over = not steps or step >= steps
    parts.append(
        Part(
            f"in {duration(elapsed)}" if over else f"{duration(per_step * (steps - step))} left", 2
        )
    )
    return parts


def validation_line(step: int, metrics: Mapping[str, Any], seconds: float) -> list[Part]:
    """What a validation has found at a step."""
    return [
        Part(f"validation, step {step}"),
        *_values(metrics, "val"),
        Part(f"in {duration(seconds)}", 6),
    ]


def _values(metrics: Mapping[str, Any], stage: str) -> list[Part]:
    """Metrics under a stage's name, and in training those of a user's own under none of ours."""
    parts = []
    for name, value in metrics.items():
        prefix, _, rest = name.partition("/")
        if prefix != stage and (stage != "train" or prefix in ("val", "test", "speed")):
            continue
        short, rank = _SHORT.get(rest, (rest, 7)) if prefix == stage else (name, 7)
        parts.append(Part(f"{short} {rounded(value, 1)}", rank))
    return parts


def rounded(value: Any, digits: int = 3) -> str:
    """Three decimals, or a few digits of what is too small or too large for them."""
    number = float(value)
    if number == 0 or not math.isfinite(number) or 1e-3 <= abs(number) < 1e4:
        return f"{number:.3f}"
    return f"{number:.{digits - 1}e}"


class ProgressLine(ProgressBar):
    """Says on standard error how far a run is. In a terminal, in one line that is written over:
    the step and the epoch, loss, margin and accuracy of the step, pairs per second since training
    began, validations aside, and the time that is left, with them. What the line has no room for
    is left out, the step never. Validations leave a line each.

    Where standard error is no terminal, as in a job's log, these are plain lines; the first step
    and the last always have one.

    Args:
        every_n_steps: optimiser steps from one line of a log to the next. None is
            ``trainer.log_every_n_steps``, but not within ten seconds of the last line, or a fifth
            of the whole training, nor later than a minute after it.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.enabled = True
        self.training: _Training | None = None
        self.loop: Progress[Any] | None = None  # of a validation, test or prediction
        self.loop_began = 0.0

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self.training = _Training(trainer.global_step, int(steps) if math.isfinite(steps) else 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Of the step before: at its own end not all callbacks had logged.
        if begins_step(trainer, batch_idx):
            self._show(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.training is not None:
            self.training.pairs += getattr(batch, "n_pairs", 0) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)
        if self.enabled:
            screen.clear()  # what Lightning says of the end goes past sys.stderr

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training, self.training = self.training, None
        if training is None or not self.enabled or trainer.global_step == training.first:
            return
        if screen.is_terminal or training.shown < trainer.global_step:
            screen.keep(training.parts(trainer))

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._end_loop()
        self.on_train_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._begin_loop("sanity check", trainer.num_sanity_val_batches)
        else:
            self._show(trainer)
            self._begin_loop("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_loop("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_loop("prediction", trainer.num_predict_batches)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.loop is not None:
            self.loop.update()

    def on_test_batch_end(self, *_: Any) -> None:
        self.on_validation_batch_end()

    def on_predict_batch_end(self, *_: Any) -> None:
        self.on_validation_batch_end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_loop()
        if self.training is not None:
            seconds = time.monotonic() - self.loop_began
            self.training.paused += seconds
            if self.enabled:
                metrics = trainer.progress_bar_metrics
                screen.keep(validation_line(trainer.global_step, metrics, seconds))

    def _begin_loop(self, title: str, batches: Any) -> None:
        total = sum(batches) if isinstance(batches, list) else batches
        known = int(total) if math.isfinite(total) else None
        self.loop = Progress((), title, known, hidden=not self.enabled)
        self.loop_began = time.monotonic()

    def _end_loop(self) -> None:
        if self.loop is not None:
            self.loop.close()
        self.loop = None

    def on_test_end(self, *_: Any) -> None:
        self._end_loop()

    def on_predict_end(self, *_: Any) -> None:
        self._end_loop()

    def _show(self, trainer: Trainer) -> None:
        """The line of the last step, where it has none yet and it is time for one."""
        training, step, now = self.training, trainer.global_step, time.monotonic()
        if not self.enabled or training is None or step in (training.first, training.shown):
            return
        if not self._is_due(trainer, training, now - training.shown_at):
            return
        training.shown, training.shown_at = step, now
        (screen.draw if screen.is_terminal else screen.keep)(training.parts(trainer))

    def _is_due(self, trainer: Trainer, training: _Training, waited: float) -> bool:
        step = trainer.global_step
        if screen.is_terminal:
            return waited >= OFTEN
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0 or training.shown < 0
        if waited >= _SELDOM:
            return True
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return waited >= between(training.whole(step), _SELDOM) and (not every or step % every == 0)
