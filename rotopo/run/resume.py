"""A fit goes on from a checkpoint as if it had not ended: the only file that edits Lightning's
loops."""

import random
import sys
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from rotopo import ranks
from rotopo.errors import InputError
from rotopo.run.lightning import validation_is_due


class Resumption:
    """What the checkpoints of a module's fit say of the place in the run, and the return to it.

    Lightning restores its loops and the loader's position. It does not restore the random state,
    counts its place in the epoch in micro-batches, and leaves out a validation that was due.
    """

    def __init__(self) -> None:
        self._random_state: dict[str, Any] | None = None
        self._loop: dict[str, Any] | None = None  # the checkpoint's, until training goes on

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what this class reads from it."""
        checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches
        checkpoint["random_states"] = ranks.of_all(_random_state())

    def load(self, trainer: Trainer, checkpoint: dict[str, Any], found: bool) -> None:
        """Take this rank's random state, and let a fit count its place as this run counts.

        Args:
            trainer: of the fit.
            checkpoint: that it goes on from.
            found: whether the accumulation will be found; until then the checkpoint's counts.

        Raises:
            InputError: it was written within a step that is cut up in another way now.
        """
        states = checkpoint["random_states"]
        rank = trainer.global_rank if len(states) == trainer.world_size else 0
        self._random_state = states[rank]
        if trainer.state.fn == TrainerFn.FITTING:
            accumulation = trainer.accumulate_grad_batches
            trainer.accumulate_grad_batches = checkpoint["accumulate_grad_batches"]
            self._loop = checkpoint["loops"]["fit_loop"]
            if not found:
                self.recut(trainer, accumulation)
            checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches

    def recut(self, trainer: Trainer, accumulation: int) -> None:
        """Let the Trainer cut steps into another number of micro-batches, and count its place so.

        Args:
            trainer: between two steps.
            accumulation: micro-batches of a step from here on.

        Raises:
            InputError: the checkpoint was written within a step.
        """
        before = trainer.accumulate_grad_batches
        if before == accumulation:
            return
        if self._loop is not None:  # which Lightning may have read by now, or not
            read, loop = self._loop["epoch_loop.batch_progress"], self._loop["state_dict"]
            # The loaders' it keeps as they are in here, until it makes loaders.
            places = [read["total"], read["current"], *loop.get("combined_loader", [])]
            _refuse_within_step(places, before)
            _recut_steps(places, before, accumulation)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        counts = progress.state_dict()
        _recut_steps([counts["total"], counts["current"]], before, accumulation)
        progress.load_state_dict(counts)
        trainer.accumulate_grad_batches = accumulation

    def enter(self, trainer: Trainer) -> None:
        """At the start of training: do what was due, and begin the next epoch where one ended."""
        self._loop = None
        self._validate_if_due(trainer)
        # From a checkpoint of an epoch's last batch Lightning resumes after that epoch, but does
        # not count the next one as begun; a second resumption would then train for too long.
        loop = trainer.fit_loop
        if loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
            loop.reset_restart_stage()
            if loop.epoch_loop.restarted_on_train_batch_end:
                # Lightning asks whether as many batches are done as the next epoch has: so that it
                # would go on within one that a selector has made longer than the last.
                loop.epoch_loop.batch_progress.current.completed = sys.maxsize

    def restore_random_state(self) -> None:
        """At the first batch, and not on load: nothing draws between here and the first step."""
        if self._random_state is not None:
            state, self._random_state = self._random_state, None
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
            torch.set_rng_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
            if state.get("mps") is not None and torch.backends.mps.is_available():
                torch.mps.set_rng_state(state["mps"])

    def _validate_if_due(self, trainer: Trainer) -> None:
        """Do the validation that a checkpoint was written just before.

        Lightning leaves it out when it goes on from such a checkpoint, and with it what early
        stopping and the choice of the best checkpoint would have seen.
        """
        loop = trainer.fit_loop
        epochs: Any = loop.epoch_progress
        batches = loop.epoch_loop.batch_progress
        if not loop.epoch_loop.restarted_on_train_batch_end:
            return
        # Put the counts where they stand while a run validates that has not been interrupted:
        # Lightning has an epoch end with its last batch, and that batch complete only later.
        ended = batches.is_last_batch and epochs.current.processed == epochs.current.ready
        for epoch, batch in ((epochs.total, batches.total), (epochs.current, batches.current)):
            epoch.processed -= ended
            epoch.completed -= ended
            batch.completed += 1
        if validation_is_due(trainer):
            self.restore_random_state()
            trainer.validating = True
            loop.epoch_loop.val_loop.restarting = False
            loop.epoch_loop.val_loop.run()
            trainer.training = True
            self._random_state = _random_state()
        for epoch, batch in ((epochs.total, batches.total), (epochs.current, batches.current)):
            epoch.processed += ended
            epoch.completed += ended
            batch.completed -= 1


def before_validation(trainer: Trainer) -> dict[str, Any]:
    """The fit loop's state at the start of a validation, as a checkpoint of the batch before has
    it: it is after that batch that a run which goes on validates, see :class:`Resumption`."""
    loops = deepcopy(trainer.fit_loop.state_dict())
    for part in ("total", "current"):
        loops["epoch_loop.batch_progress"][part]["completed"] -= 1
    return loops


def keep_given(callbacks: list[Callback], states: dict[str, Any]) -> None:
    """Take out of callbacks' states what are settings: what is given now counts.

    Args:
        callbacks: of the run.
        states: the checkpoint's, by which Lightning is about to restore them.
    """
    for callback in callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state:
            state["patience"] = callback.patience


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _refuse_within_step(places: list[dict[str, int]], accumulation: int) -> None:
    if any(count % accumulation for counts in places for count in _kept(counts).values()):
        raise InputError(
            f"ckpt_path: this checkpoint was written within an optimiser step of {accumulation} "
            f"micro-batches: set trainer.accumulate_grad_batches to {accumulation}."
        )


def _recut_steps(places: list[dict[str, int]], before: int, after: int) -> None:
    """Let counts of micro-batches be of those that steps are cut into after this.

    A step is the same pairs on any number of ranks and in any number of micro-batches, but
    Lightning counts micro-batches.
    """
    for counts in places:
        behind = counts["ready"] - counts["completed"] if "ready" in counts else 0
        counts |= {name: count // before * after for name, count in _kept(counts).items()}
        if "ready" in counts:
            counts["completed"] = counts["ready"] - behind


def _kept(counts: dict[str, int]) -> dict[str, int]:
    """Those that a checkpoint of a whole step has whole: it is written before its last micro-batch
    counts as completed."""
    return {name: count for name, count in counts.items() if name != "completed"}
