"""Runs that are known by all of their settings: none is done twice, and one that was interrupted
goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotopo.files import to_json, write_whole
from rotopo.run.checkpoints import last_good


@dataclass(frozen=True)
class ContinuedRun:
    """A run in a folder of its own.

    Args:
        folder: the run's; under other settings it has another one.
        record: the file in it that says what came of the run, once it is done.
    """

    folder: Path
    record: Path

    @classmethod
    def of(
        cls,
        name: Path,
        record: str,
        arguments: Sequence[str],
        files: Iterable[Path],
        *facts: Any,
    ) -> "ContinuedRun":
        """The run of a command.

        Args:
            name: of the folder, up to the hash of all that follows.
            record: the name of its record.
            arguments: of the command.
            files: whose content counts: those of settings.
            facts: whatever else tells the run from others, as JSON can hold it.
        """
        contents = [file.read_text("utf-8") for file in files]
        key = short_hash(json.dumps([arguments, contents, *facts]))
        folder = name.with_name(f"{name.name}-{key}")
        return cls(folder, folder / record)

    @property
    def is_done(self) -> bool:
        return self.record.exists()

    def finish(self, outcome: dict[str, Any]) -> None:
        """Write down what came of it: it is done."""
        write_whole(self.record, to_json(outcome))

    def outcome(self) -> dict[str, Any]:
        """What came of it, as it was written."""
        return json.loads(self.record.read_text("utf-8"))


def short_hash(text: str) -> str:
    """Eight digits that tell a few thousand texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def from_last_checkpoint(folder: Path) -> list[str]:
    """The option that loads the last good checkpoint of a training, if its folder has one."""
    last = last_good(folder)
    return [f"--ckpt_path={last}"] if last is not None else []
