"""A fit that is told to end keeps what it has done."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rotopo import ranks
from rotopo.endings import Ended, Signals, end, say
from rotopo.run.checkpoints import kept_in
from rotopo.run.lightning import callbacks_of
from rotopo.run.resume import before_validation
from rotopo.run.slurm import Requeue
from rotopo.run.steps import ends_step


class Interruption(Callback):
    """On Ctrl-C, SIGTERM and SIGHUP a fit ends with the optimiser step, or the batch of a
    validation, that is at hand, and keeps what it has done, if it keeps checkpoints. A second
    Ctrl-C ends it at once.

    So it does on the signal at which its SLURM job is to be queued again, and has SLURM do that
    (:class:`rotopo.run.slurm.Requeue`). Until the first step there is nothing to keep, and signals
    end the process as they end any other.

    Lightning would end in the midst of a step and keep nothing; and of several ranks each would
    wait for the others inside its signal handler, wherever they are.

    Attributes:
        kept: the checkpoint that was written, once it was.

    Raises:
        Ended: in the place of the next step.
    """

    def __init__(self) -> None:
        self.asked = 0  # by this signal, the first
        self.kept: str | None = None
        self._keeps = False
        self._saved_step = -1
        self._signals: Signals | None = None
        self._requeue: Requeue | None = None
        # The loops as they were when the validation at hand was about to begin.
        self._before_validation: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.asked, self.kept, self._keeps = 0, None, kept_in(trainer) is not None
        found = (one for one in callbacks_of(trainer) if isinstance(one, Requeue))
        self._requeue = next(found, None)
        more = [self._requeue.signal] if self._requeue is not None and self._requeue.signal else []
        self._signals = Signals(self._ask, more)
        self._signals.take()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._give_back()

    @contextmanager
    def at_once(self, trainer: Trainer) -> Iterator[None]:
        """Where long work lies between two steps: signals end the run then and there, if its last
        checkpoint has all its steps, and one process has made them."""
        signals = self._signals
        if signals is None or self._saved_step != trainer.global_step or trainer.world_size > 1:
            yield
            return
        if self.asked:
            raise Ended(self.asked)
        signals.ask = end
        try:
            yield
        finally:
            signals.ask = self._ask

    def _give_back(self) -> None:
        if self._signals is not None:
            self._signals.give_back()

    def _ask(self, number: int) -> None:
        if number == signal.SIGINT and not self.asked:
            then = "and what is done is saved" if self._keeps else "and nothing is kept"
            say(f"this step is finished first, {then}; a second Ctrl-C ends the run at once.")
        self.asked = self.asked or number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            self._end_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._before_validation = before_validation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._before_validation is not None:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._before_validation = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_step = trainer.global_step
        if self._before_validation is not None:
            checkpoint["loops"]["fit_loop"] = self._before_validation

    def _end_if_asked(self, trainer: Trainer) -> None:
        any_rank = trainer.strategy.reduce_boolean_decision
        if not any_rank(bool(self.asked), all=False):
            return
        requeue = self._requeue
        again = requeue is not None and any_rank(self.asked == requeue.signal > 0, all=False)
        folder = kept_in(trainer)
        if folder is not None:
            self.kept = trainer.strategy.broadcast(free_name(folder))
            trainer.save_checkpoint(self.kept)
        if not (again and requeue):
            raise Ended(max(ranks.of_all(self.asked)))
        if trainer.is_global_zero:
            requeue.job.queue_again()
        trainer.strategy.barrier()  # SLURM may end all ranks when one has ended
        raise Ended(requeue.signal)


def ending_at_once(trainer: Trainer) -> AbstractContextManager[None]:
    """As :meth:`Interruption.at_once`, of a run's."""
    found = next((one for one in callbacks_of(trainer) if isinstance(one, Interruption)), None)
    return nullcontext() if found is None else found.at_once(trainer)


def free_name(folder: str) -> str:
    """Another one than that of an earlier start, in a folder that several starts keep theirs in."""
    name = file = f"{folder}/last-interrupted"
    for version in count(1):
        if not Path(f"{file}.ckpt").exists():
            break
        file = f"{name}-v{version}"
    return f"{file}.ckpt"
