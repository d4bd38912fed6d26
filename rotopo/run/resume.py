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

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what this class reads from it."""
        checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches
        checkpoint["random_states"] = ranks.of_all(_random_state())

    def load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Take this rank's random state, and let a fit count its place as this run counts.

        Raises:
            InputError: it was written within a step that is cut up in another way now.
        """
        states = checkpoint["random_states"]
        rank = trainer.global_rank if len(states) == trainer.world_size else 0
        self._random_state = states[rank]
        if trainer.state.fn == TrainerFn.FITTING:
            _recut_steps(checkpoint, trainer.accumulate_grad_batches)

    def enter(self, trainer: Trainer) -> None:
        """At the start of training: do what was due, and begin the next epoch where one ended."""
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
    }


def _recut_steps(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Let a checkpoint count its place in the epoch in micro-batches of another size.

    A step is the same pairs on any number of ranks and in any number of micro-batches, but
    Lightning counts micro-batches.

    Raises:
        InputError: the checkpoint was written within a step.
    """
    before = checkpoint["accumulate_grad_batches"]
    if before == accumulation:
        return
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    loaders = loop["state_dict"].get("combined_loader", [])
    for counts in (progress["total"], progress["current"], *loaders):
        behind = counts["ready"] - counts["completed"] if "ready" in counts else 0
        for name in counts.keys() - {"completed"}:
            if counts[name] % before:
                raise InputError(
                    f"ckpt_path: this checkpoint was written within an optimiser step of {before} "
                    f"micro-batches: set trainer.accumulate_grad_batches to {before}."
                )
            counts[name] = counts[name] // before * accumulation
        if "ready" in counts:
            counts["completed"] = counts["ready"] - behind
    checkpoint["accumulate_grad_batches"] = accumulation
