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
        self.file: TextIO | None = None

    def _target(self, trainer: Trainer) -> Path:
        return self.path or Path(trainer.log_dir or trainer.default_root_dir) / "responses.jsonl"

    def _part(self, trainer: Trainer, rank: int) -> Path:
        target = self._target(trainer)
        return target.with_name(f".{target.name}.part-{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        self.file = part.open("w", encoding="utf-8")

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
            parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
            lines = [line for part in parts for line in part.read_text("utf-8").splitlines()]
            lines.sort(key=lambda line: json.loads(line)["row"])
            parts[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
            parts[0].replace(self._target(trainer))
            for part in parts[1:]:
                part.unlink()
            print(f"{len(lines)} responses in {self._target(trainer)}")
