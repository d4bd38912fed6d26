"""What ROPO's alternation decides after a round, and what is written of it."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from rotopo.data.module import PairwiseDataModule
from rotopo.files import to_json, to_jsonl, write_whole
from rotopo.robust.flips import flip_detection
from rotopo.robust.resampling import NewPair

_COLUMNS = (
    *("round", "pair", "row", "flipped", "loss", "margin", "weight", "outcome"),
    *("new_loss", "new_chosen", "new_rejected"),
)
_ARRAYS = ("losses", "margins", "kept")


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

    def new_rows(self) -> list[tuple[int, list[int], list[int]]]:
        """The accepted pairs as :meth:`rotopo.data.rows.Rows.select` takes them."""
        return [(i, pair.chosen, pair.rejected) for i, pair in self.accepted.items()]

    def outcomes(self) -> list[str]:
        """What became of each pair: ``kept``, ``dropped`` (without resampling), ``accepted``,
        ``no pair`` (no two responses differed in reward) or ``refused`` (the new pair's loss was
        too large) [N]."""
        found = np.where(self.kept, "kept", "dropped").tolist()
        for place, pair in self.new.items():
            found[place] = "no pair" if pair is None else "refused"
        for place in self.accepted:
            found[place] = "accepted"
        return found

    def numbers(self, flipped: np.ndarray | None, rho: float) -> dict[str, float]:
        """The decision in short; with flips, how they fared.

        Args:
            flipped: whether each label was flipped, where that is known [N].
            rho: ρ, the share that was dropped.
        """
        kept = self.kept
        found: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "pairs": len(kept),
            "kept": int(kept.sum()),
            "dropped": int((~kept).sum()),
            "loss_kept": float(self.losses[kept].mean()),
        }
        if not kept.all():
            found["loss_dropped"] = float(self.losses[~kept].mean())
        if self.new:
            found["new_pairs"] = sum(pair is not None for pair in self.new.values())
            found["most"] = self.most
            found["accepted"] = len(self.accepted)
            found["acceptance_rate"] = len(self.accepted) / len(self.new)
        if flipped is not None:
            found |= flip_detection(self.margins, flipped, rho)
            if "precision" in found:  # what the filter dropped, by the losses and not the margins
                found["precision"] = float(flipped[~kept].mean())
        return found

    def plain(self) -> dict[str, Any]:
        """For a checkpoint, which holds tensors and plain types only, and tokens of new pairs only
        where they are trained on."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in _ARRAYS}
        made = {place: pair for place, pair in self.new.items() if pair is not None}
        trained = self.accepted
        tokens = [ids for pair in trained.values() for ids in (pair.chosen, pair.rejected)]
        return (
            vars(self)
            | arrays
            | {
                "new": list(self.new),
                "made": list(made),
                "origins": [pair.origin for pair in made.values()],
                "numbers": torch.tensor(
                    [[*pair.rewards, pair.loss] for pair in made.values()], dtype=torch.float64
                ),
                "lengths": [len(ids) for ids in tokens],
                "tokens": torch.tensor([i for ids in tokens for i in ids], dtype=torch.int32),
            }
        )

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> Self:
        """As it was before :meth:`plain`, but for the tokens of refused pairs."""
        new: dict[int, NewPair | None] = dict.fromkeys(state["new"])
        tokens = iter(state["tokens"].split(state["lengths"]))
        for place, origin, (chosen, rejected, loss) in zip(
            state["made"], state["origins"], state["numbers"].tolist(), strict=True
        ):
            trained = loss <= state["most"]
            w, l = ((next(tokens).tolist() if trained else []) for _ in range(2))  # noqa: E741
            new[place] = NewPair(w, l, tuple(origin), (chosen, rejected), loss)
        arrays = {name: state[name].cpu().numpy() for name in _ARRAYS}
        return cls(state["epoch"], state["step"], **arrays, most=state["most"], new=new)


def write(decisions: list[Decision], data: PairwiseDataModule, rho: float, folder: Path) -> None:
    """Write ``rounds.json``, ``pairs.csv`` and ``accepted.jsonl``, each whole.

    Args:
        decisions: of all rounds so far.
        data: the datamodule.
        rho: ρ, the share that was dropped.
        folder: where to.
    """
    flipped = data.pairs.flipped()
    numbers = data.rows("train").pairs["row"][:]
    decode = data.encoder.tokenizer.decode
    rounds, accepted, table = [], [], io.StringIO()
    pairs = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
    pairs.writeheader()
    for t, decision in enumerate(decisions, 1):
        rounds.append({"round": t} | decision.numbers(flipped, rho))
        outcomes = decision.outcomes()
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
                "outcome": outcomes[place],
            }
            if new is not None:
                line |= {"new_loss": new.loss}
                line |= {"new_chosen": new.origin[0], "new_rejected": new.origin[1]}
            pairs.writerow(line)
        for place, pair in decision.accepted.items():
            texts = (decode(i, skip_special_tokens=True) for i in (pair.chosen, pair.rejected))
            chosen, rejected = texts
            preference = data.pairs.preference("train", numbers[place])
            accepted.append(
                {
                    "round": t,
                    "row": numbers[place],
                    "prompt": preference.prompt,
                    **preference.inputs.columns,
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
    if any(decision.new for decision in decisions):
        write_whole(folder / "accepted.jsonl", to_jsonl(accepted))
