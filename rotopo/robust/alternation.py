"""ROPO's alternation (arXiv 2404.04102): train, score all pairs, keep those of small loss, repeat.

It minimises Σ w_i ℓ(θ; i) over θ and w in turns, with w_i in [0, 1] and Σ w_i = N_ρ. The outline is
the paper's, as accounts of it have it [2nd]; the order of things, the sampling, ρ and the number
of rounds are [ours], for the paper's were not found:

- Round 1 trains on all N pairs.
- After each round but the last all N pairs are scored; the N_ρ of smallest loss are kept and the
  others dropped; new pairs are sampled for the prompts of the dropped, and some accepted.
- The next round trains on what was kept and accepted, with the optimiser carried over.
"""

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rotopo.callbacks.reference import cache_rows
from rotopo.data.rows import Rows
from rotopo.errors import InputError
from rotopo.robust.decisions import Decision, write
from rotopo.robust.resampling import NewPair, Resampling, check, resample
from rotopo.robust.scoring import require_pairs, score
from rotopo.robust.selection import keep, n_kept, threshold
from rotopo.run.folder import folder_of
from rotopo.run.interruption import ending_at_once
from rotopo.run.lightning import data_of, remake_loaders_every_epoch


class Alternation(Callback):
    """Alternates training with filtering, and with sampling new pairs: ROPO as a procedure.

    A round is ``epochs_per_round`` epochs, and T of them are T · ``epochs_per_round`` =
    ``trainer.max_epochs``. Works with any objective, whose loss is what pairs are ranked by, and
    without ``resampling`` also with reward models. With ``policy.reference: cached`` scoring takes
    one forward pass over the pairs, else the reference's as well. Later rounds have fewer steps,
    which a schedule with ``total_steps`` does not know: it ends before its last step. Loaders, and
    their workers, are made anew for every epoch, and ``data.token_budget`` finds the accumulation
    anew for a round's pairs.

    In the run's folder ``rounds/`` it writes what was decided after each round, whole each time:
    ``rounds.json`` (numbers), ``pairs.csv`` (every original pair with its loss, its margin, its
    weight w and what became of it) and ``accepted.jsonl`` (the new pairs). All of it is in
    checkpoints too: a run that was killed anywhere in a round goes on as if it had not been.
    With ``data.noise`` the numbers include how the flipped labels fared, see
    :func:`rotopo.robust.flips.flip_detection`. They are logged as ``round/...``.

    Args:
        epochs_per_round: E.
        rho: ρ, the share of the original pairs that is dropped after each round.
        resampling: how new pairs are made; None makes none.

    Raises:
        InputError: a setting out of its range, data or an objective that it cannot work with.
    """

    def __init__(
        self, epochs_per_round: int = 1, rho: float = 0.2, resampling: Resampling | None = None
    ) -> None:
        if epochs_per_round < 1:
            raise InputError(f"epochs_per_round is {epochs_per_round}: it has to be at least 1.")
        if not 0 <= rho < 1:
            raise InputError(f"rho is {rho}: it has to be at least 0 and below 1.")
        self.epochs_per_round = epochs_per_round
        self.rho = rho
        self.resampling = resampling
        self.decisions: list[Decision] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = data_of(trainer)
        if trainer.current_epoch == 0:  # else the same Trainer goes on
            self.decisions = []
        data.let_choose(self)
        remake_loaders_every_epoch(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        rows = data.rows("train")
        require_pairs(rows, "Alternation")
        self._check_rounds(trainer)
        kept = n_kept(len(rows), self.rho)
        if kept < data.batching.pairs_per_step:
            raise InputError(
                f"rho is {self.rho}, which keeps {kept} of {len(rows)} pairs: fewer than "
                f"data.pairs_per_step ({data.batching.pairs_per_step})."
            )
        shortest = kept // data.batching.pairs_per_step * trainer.accumulate_grad_batches
        every = trainer.val_check_interval
        if isinstance(every, int) and trainer.check_val_every_n_epoch and every > shortest:
            raise InputError(
                f"trainer.val_check_interval is {every}, but a round may have {shortest} "
                "micro-batches only: lower it, or give a fraction."
            )
        if pl_module.couples_pairs:
            name = type(pl_module).__name__
            raise InputError(
                f"Alternation: {name}'s loss of a pair depends on the pairs beside it, so that "
                "they cannot be ranked by it: take another objective, such as ROPO or DPO."
            )
        if self.resampling is not None:
            check(trainer, rows, self.resampling)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)  # of a resumed run the rounds before

    def settings(self) -> str:
        """What decisions follow from: a checkpoint of other settings is refused."""
        return f"rho={self.rho}, epochs_per_round={self.epochs_per_round}, {self.resampling}"

    def training_rows(self, trainer: Trainer, rows: Rows) -> Rows:
        """What the epoch that begins trains on.

        Lightning asks for a loader before each epoch, at its beginning and also when it resumes:
        so this is where a decision is made if it has not been, with the weights as they are then.
        """
        epoch = trainer.current_epoch
        if trainer.max_epochs not in (None, -1):
            epoch = min(epoch, trainer.max_epochs - 1)  # of a run that is over
        rounds = epoch // self.epochs_per_round
        if rounds == 0:
            return rows
        if len(self.decisions) < rounds - 1:
            raise InputError(
                f"Alternation: epoch {epoch} begins, but the rounds before it were trained without "
                "this callback: begin anew."
            )
        if len(self.decisions) < rounds:
            with ending_at_once(trainer):
                decision = self._decide(trainer, rows)
            self.decisions.append(decision)
            self._write(trainer)
            self._log(trainer)
        decision = self.decisions[rounds - 1]
        if decision.kept.all():
            return rows
        return rows.select(np.flatnonzero(decision.kept).tolist(), decision.new_rows())

    def state_dict(self) -> dict[str, Any]:
        return {"decisions": [decision.plain() for decision in self.decisions]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.decisions = [Decision.from_plain(state) for state in state_dict["decisions"]]

    def _check_rounds(self, trainer: Trainer) -> None:
        E, epochs = self.epochs_per_round, trainer.max_epochs
        if trainer.fast_dev_run or epochs in (None, -1):  # type: ignore[attr-defined]
            return
        if epochs % E or epochs < 2 * E:
            raise InputError(
                f"trainer.max_epochs is {epochs} and epochs_per_round {E}: rounds have to be "
                "whole, and two at least, since nothing is filtered within one: set "
                f"trainer.max_epochs to {2 * E}, {3 * E}, {4 * E}, ..."
            )

    def _decide(self, trainer: Trainer, rows: Rows) -> Decision:
        scores = score(trainer, rows, "Scoring all pairs")
        kept = keep(scores.losses, n_kept(len(rows), self.rho))
        new: dict[int, NewPair | None] = {}
        most = -np.inf
        if self.resampling is not None and not kept.all():
            most = threshold(scores.losses[kept], self.resampling.quantile)
            dropped = np.flatnonzero(~kept).tolist()
            new = dict(zip(dropped, resample(trainer, rows, dropped, self.resampling), strict=True))
        decision = Decision(
            trainer.current_epoch,
            trainer.global_step,
            scores.losses,
            scores.margins,
            kept,
            most,
            new,
        )
        accepted = rows.select([], decision.new_rows())
        if len(accepted):
            cache_rows(trainer, accepted, range(len(accepted)), "Reference of new pairs")
        return decision

    def _log(self, trainer: Trainer) -> None:
        data = data_of(trainer)
        found = self.decisions[-1].numbers(data.pairs.flipped(), self.rho)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"round/{name}": value for name, value in found.items()}, trainer.global_step
            )
        text = f"Round {len(self.decisions)}: {found['kept']} of {found['pairs']} pairs kept"
        if "accepted" in found:
            text += f", {found['accepted']} new pairs accepted for {found['dropped']} dropped"
        if "auroc" in found:
            text += f"; flipped labels: AUROC {found['auroc']:.3f}"
        if "precision" in found:
            text += f", {found['precision']:.0%} of the dropped"
        rank_zero_info(text + ".")

    def _write(self, trainer: Trainer) -> None:
        folder = folder_of(trainer) / "rounds"  # on every rank
        if self.decisions and trainer.is_global_zero:
            write(self.decisions, data_of(trainer), self.rho, folder)
