"""Generated responses as jsonl."""

import json
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from rotopo.data.batch import PromptBatch


class ResponseWriter(Callback):
    """Writes what ``predict`` generates: one line ``{"row", "prompt", "response"}`` per prompt.

    The file appears under its name only when it is complete.

    Args:
        path: where to; None is ``responses.jsonl`` in the run's folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.target: Path | None = None
        self.file: TextIO | None = None

    def _part(self, rank: int) -> Path:
        assert self.target is not None
        return self.target.with_name(f".{self.target.name}.part-{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank
        self.target = self.path or folder / "responses.jsonl"
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.file = self._part(trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[list[int]],
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        tokenizer: Any = trainer.datamodule.encoder.tokenizer  # type: ignore[attr-defined]
        assert self.file is not None
        for row, ids, mask, response in zip(
            batch.rows.tolist(), batch.input_ids, batch.attention_mask, outputs, strict=True
        ):
            line = {
                "row": row,
                "prompt": tokenizer.decode(ids[mask.bool()].tolist()),
                "response": tokenizer.decode(response, skip_special_tokens=True),
            }
            print(json.dumps(line, ensure_ascii=False), file=self.file)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.file is not None
        self.file.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            assert self.target is not None
            parts = [self._part(rank) for rank in range(trainer.world_size)]
            # By line feeds alone: a response may hold other characters that end lines.
            lines = [line for part in parts for line in part.read_text("utf-8").split("\n") if line]
            lines.sort(key=lambda line: json.loads(line)["row"])
            parts[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
            parts[0].replace(self.target)
            for part in parts[1:]:
                part.unlink()
            print(f"{len(lines)} responses in {self.target}")
