"""What ``predict`` finds out, as jsonl; a killed run goes on where it stopped."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rotopo.endings import ended
from rotopo.errors import InputError
from rotopo.files import to_jsonl, write_whole
from rotopo.run.folder import folder_of
from rotopo.run.lightning import data_of


class PredictionWriter(Callback):
    """Writes one line per row: ``responses.jsonl``, or ``scores.jsonl`` with ``data.score``.

    A line holds ``row``, ``prompt``, ``response`` and ``tokens`` (of the response), and a score
    where the responses were given. Lines are in the rows' order, and the file appears under its
    name only when it is complete; beside it lies what an evaluation reads, where ``data.prompts``
    holds its questions. Until then, finished batches are kept in the folder
    ``.unfinished`` beside the run's, under a hash of everything that the predictions follow from:
    weights, rows, settings, batches and ranks. The same run, started again, finds and keeps them.

    Args:
        path: where to; None is a file in the run's folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.folder = Path()
        self.part: TextIO | None = None
        self.rows: set[int] = set()  # of this rank's batches

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        data = data_of(trainer)
        settings = [pl_module.prediction_fingerprint(), data.prediction_fingerprint()]
        settings += [trainer.world_size, trainer.precision, trainer.limit_predict_batches]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        key = trainer.strategy.broadcast(key)  # FSDP1's flat shares differ by rank
        root = trainer.logger.save_dir if trainer.logger is not None else None
        self.folder = Path(root or trainer.default_root_dir) / ".unfinished" / key
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(trainer.global_rank)
        self.part = file.open("a", encoding="utf-8")
        try:
            fcntl.flock(self.part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Another process makes these very predictions, in {self.folder}: let it end."
            ) from error
        self.rows = set()
        done = _whole_lines(file)
        pl_module.leave_out(done)
        if done:
            rank_zero_info(f"Going on with an interrupted run: {len(done)} rows are there.")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: list[dict[str, Any]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.rows.update(batch.rows.tolist())
        if not outputs:
            return
        assert self.part is not None
        data = data_of(trainer)
        for row, found in zip(batch.rows.tolist(), outputs, strict=True):
            if not math.isfinite(found.get("score", 0)):
                raise InputError(f"row {row} scores {found['score']}: the model has diverged.")
            line = [row, data.predicted.line(row) | found]
            self.part.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.part.flush()
        os.fsync(self.part.fileno())

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.part is None:
            return
        self.part.close()  # and with it the lock
        stop = ended(exception)
        if stop is not None and self.folder.is_dir():
            done = sum(file.read_bytes().count(b"\n") for file in self.folder.glob("part-*.jsonl"))
            stop.advice = (
                f"after {done} rows, which are kept in {self.folder}: the same command goes on "
                "from there."
            )

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert self.part is not None
        pl_module.leave_out(())
        rows = trainer.strategy.reduce(
            torch.tensor(len(self.rows), device=pl_module.device), reduce_op="sum"
        )
        data = data_of(trainer)
        name = "responses.jsonl" if data.score is None else "scores.jsonl"
        target = self.path or folder_of(trainer) / name
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            self.part.close()
            return
        lines: dict[int, Any] = {}
        for rank in range(trainer.world_size):
            lines |= _whole_lines(self._file(rank))
        if len(lines) != int(rows):
            raise InputError(
                f"{self.folder} holds {len(lines)} of {int(rows)} rows: let "
                "trainer.default_root_dir be a folder that all nodes share."
            )
        found = [lines[row] for row in sorted(lines)]
        write_whole(target, to_jsonl(found))
        answers = data.predicted.answers(found, _name_of(trainer, pl_module))
        if answers is not None:
            write_whole(target.parent / answers.file, answers.text)
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):  # other runs may be unfinished
            self.folder.parent.rmdir()
        self.part.close()  # and with it the lock
        print(f"{len(lines)} lines in {target}")
        if answers is not None:
            print(f"For {answers.evaluation} in {target.parent / answers.file}")
            most = pl_module.sampling.max_new_tokens
            reached = sum(
                most in (line["tokens"], *line.get("earlier_tokens", ())) for line in found
            )
            if reached:
                print(
                    f"{reached} of {len(found)} answers reach model.sampling.max_new_tokens "
                    f"({most}), at which they are cut off."
                )

    def _file(self, rank: int) -> Path:
        return self.folder / f"part-{rank}.jsonl"


def _name_of(trainer: Trainer, module: Any) -> str:
    """What evaluations call a model: its path's last part, and the objective that trained it."""
    name = Path(module.model_config.path).name.removesuffix(".gguf")
    return f"{name}-{type(module).__name__}" if trainer.ckpt_path else name


def _whole_lines(file: Path) -> dict[int, Any]:
    """Rows and their lines; a torn end is cut off the file.

    Raises:
        InputError: a line that is whole is not ours.
    """
    if not file.exists():
        return {}
    # By line feeds alone: a response may hold other characters that end lines.
    *lines, torn = file.read_bytes().split(b"\n")
    if torn:
        os.truncate(file, file.stat().st_size - len(torn))
    try:
        return dict(json.loads(line) for line in lines)
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged: remove it, and these rows are done again.") from error
