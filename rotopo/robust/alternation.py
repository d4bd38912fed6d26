"""ROPO's alternation (arXiv 2404.04102): train, score all pairs, keep those of small loss, repeat.

It minimises Σ w_i ℓ(θ; i) over θ and w in turns, with w_i in [0, 1] and Σ w_i = N_ρ. The outline is
the paper's, as accounts of it have it; the order of things and the sampling are [ours]:

- Round 1 trains on all N pairs.
- After each round but the last all N pairs are scored; the N_ρ of smallest loss are kept and the
  others dropped; new pairs are sampled for the prompts of the dropped, and some accepted.
- The next round trains on what was kept and accepted, with the optimiser carried over.
"""

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from rotopo.callbacks.reference import cache_rows
from rotopo.data.rows import Rows
from rotopo.errors import InputError
from rotopo.files import to_json, to_jsonl, write_whole
from rotopo.robust.flips import flip_detection
from rotopo.robust.resampling import NewPair, Resampling, check, resample
from rotopo.robust.scoring import score
from rotopo.robust.selection import keep, n_kept, threshold

_COLUMNS = (
    *("round", "pair", "row", "flipped", "loss", "margin", "weight", "outcome"),
    *("new_loss", "new_chosen", "new_rejected"),
)


@dataclass(frozen=True)
class Decision:
    """What was decided after a round, on all N original pairs.

    Attributes:
        epoch, step: epochs and optimiser steps that were over.
        losses, margins: of the pairs as they were labelled [N].
        kept: w, as true and false [N].
        most: the largest loss with which a new pair was accepted.
        new: the new pair of each dropped one, by its place; None where none could be made. Empty
            without resampling.
    """

    epoch: int
    step: int
    losses: np.ndarray
    margins: np.ndarray
    kept: np.ndarray
    most: float
    new: dict[int, NewPair | None]

    @property
    def accepted(self) -> dict[int, NewPair]:
        """The new pairs that are trained on, by the place of the pair that was dropped."""
        return {i: pair for i, pair in self.new.items() if pair and pair.loss <= self.most}

    def outcome(self, place: int) -> str:
        """``kept``, ``dropped`` (without resampling), ``accepted``, ``no pair`` (no two responses
        differed in reward) or ``refused`` (the new pair's loss was too large)."""
        if self.kept[place]:
            return "kept"
        if place not in self.new:
            return "dropped"
        if self.new[place] is None:
            return "no pair"
        return "accepted" if place in self.accepted else "refused"


class Alternation(Callback):
    """Alternates training with filtering, and with sampling new pairs: ROPO as a procedure.

    A round is ``epochs_per_round`` epochs, and T of them are T · ``epochs_per_round`` =
    ``trainer.max_epochs``. Works with any objective, whose loss is what pairs are ranked by, and
    without ``resampling`` also with reward models. With ``policy.reference: cached`` scoring takes
    one forward pass over the pairs, else the reference's as well. Later rounds have fewer steps,
    which a schedule with ``total_steps`` does not know: it ends before its last step.

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
        self.trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.trainer, self.decisions = trainer, []
        data.selector = self
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        pairs = len(data.rows("train"))
        kept = n_kept(pairs, self.rho)
        if kept < data.pairs_per_step:
            raise InputError(
                f"rho is {self.rho}, which keeps {kept} of {pairs} pairs: fewer than "
                f"data.pairs_per_step ({data.pairs_per_step})."
            )
        if pl_module.couples_pairs:
            name = type(pl_module).__name__
            raise InputError(
                f"Alternation: {name}'s loss of a pair depends on the pairs beside it, so that "
                "they cannot be ranked by it: take another objective, such as ROPO or DPO."
            )
        if self.resampling is not None:
            check(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)  # of a resumed run the rounds before

    def settings(self) -> str:
        """What decisions follow from: a checkpoint of other settings is refused."""
        return f"rho={self.rho}, epochs_per_round={self.epochs_per_round}, {self.resampling}"

    def training_rows(self, rows: Rows) -> Rows:
        """What the epoch that begins trains on.

        Lightning asks for a loader before each epoch, at its beginning and also when it resumes:
        so this is where a decision is made if it has not been, with the weights as they are then.
        """
        trainer = self.trainer
        assert trainer is not None
        epoch = trainer.current_epoch
        if trainer.max_epochs not in (None, -1):
            epoch = min(epoch, trainer.max_epochs - 1)  # of a run that is over
        rounds = epoch // self.epochs_per_round
        if rounds == 0:
            return rows
        if len(self.decisions) < rounds:
            self.decisions.append(self._decide(trainer, rows))
            self._write(trainer)
            self._log(trainer)
        decision = self.decisions[rounds - 1]
        if decision.kept.all():
            return rows
        new = [(i, pair.chosen, pair.rejected) for i, pair in decision.accepted.items()]
        return rows.select(np.flatnonzero(decision.kept).tolist(), new)

    def state_dict(self) -> dict[str, Any]:
        return {"decisions": [_plain(decision) for decision in self.decisions]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.decisions = [_from_plain(decision) for decision in state_dict["decisions"]]

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
        accepted = [(i, pair.chosen, pair.rejected) for i, pair in decision.accepted.items()]
        if accepted:
            new_rows = rows.select([], accepted)
            cache_rows(trainer, new_rows, range(len(accepted)), "Reference of new pairs")
        return decision

    def _numbers(self, decision: Decision, flipped: np.ndarray | None) -> dict[str, float]:
        """A decision in short."""
        kept = decision.kept
        found: dict[str, float] = {
            "epoch": decision.epoch,
            "step": decision.step,
            "pairs": len(kept),
            "kept": int(kept.sum()),
            "dropped": int((~kept).sum()),
            "loss_kept": float(decision.losses[kept].mean()),
        }
        if not kept.all():
            found["loss_dropped"] = float(decision.losses[~kept].mean())
        if decision.new:
            found["new_pairs"] = sum(pair is not None for pair in decision.new.values())
            found["most"] = decision.most
            found["accepted"] = len(decision.accepted)
            found["acceptance_rate"] = len(decision.accepted) / len(decision.new)
        if flipped is not None:
            found |= flip_detection(decision.margins, flipped, self.rho)
        return found

    def _log(self, trainer: Trainer) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = self._numbers(self.decisions[-1], data.flipped())
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
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "rounds"  # on every rank
        if self.decisions:
            self._write_files(trainer.datamodule, folder)  # type: ignore[attr-defined]

    @rank_zero_only
    def _write_files(self, data: Any, folder: Path) -> None:
        flipped = data.flipped()
        numbers = data.rows("train").pairs["row"][:]
        decode = data.encoder.tokenizer.decode
        rounds, accepted, table = [], [], io.StringIO()
        pairs = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
        pairs.writeheader()
        for t, decision in enumerate(self.decisions, 1):
            rounds.append({"round": t} | self._numbers(decision, flipped))
            for place, row in enumerate(numbers):
                new = decision.new.get(place)
                line = {
                    "round": t,
                    "pair": place,
                    "row": row,
                    "flipped": "" if flipped is None else int(flipped[place]),
                    "loss": decision.losses[place],
                    "margin": decision.margins[place],
                    "weight": int(decision.kept[place]),
                    "outcome": decision.outcome(place),
                }
                if new is not None:
                    line |= {"new_loss": new.loss}
                    line |= {"new_chosen": new.origin[0], "new_rejected": new.origin[1]}
                pairs.writerow(line)
            for place, pair in decision.accepted.items():
                texts = (decode(i, skip_special_tokens=True) for i in (pair.chosen, pair.rejected))
                chosen, rejected = texts
                accepted.append(
                    {
                        "round": t,
                        "row": numbers[place],
                        "prompt": data.preference("train", numbers[place]).prompt,
                        "chosen": chosen,
                        "rejected": rejected,
                        "chosen_from": pair.origin[0],
                        "rejected_from": pair.origin[1],
                        "chosen_reward": pair.rewards[0],
                        "rejected_reward": pair.rewards[1],
                        "loss": pair.loss,
                    }
                )
        write_whole(folder / "rounds.json", to_json(rounds))
        write_whole(folder / "pairs.csv", table.getvalue())
        if self.resampling is not None:
            write_whole(folder / "accepted.jsonl", to_jsonl(accepted))


def _plain(decision: Decision) -> dict[str, Any]:
    """For a checkpoint, which holds tensors and plain types only."""
    arrays = {name: torch.from_numpy(getattr(decision, name)) for name in ("losses", "margins")}
    arrays["kept"] = torch.from_numpy(decision.kept)
    new = {place: pair and asdict(pair) for place, pair in decision.new.items()}
    return vars(decision) | arrays | {"new": new}


def _from_plain(state: dict[str, Any]) -> Decision:
    arrays = {name: state[name].cpu().numpy() for name in ("losses", "margins", "kept")}
    new = {place: pair and NewPair(**pair) for place, pair in state["new"].items()}
    return Decision(**(state | arrays | {"new": new}))
