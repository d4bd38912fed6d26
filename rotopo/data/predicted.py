"""What ``predict`` works on: the prompts of a held-out split, or the responses of a file."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotopo.data.pairs import Pairs
from rotopo.data.responses import Responses
from rotopo.data.rows import Rows
from rotopo.errors import InputError
from rotopo.files import sha256

if TYPE_CHECKING:  # else rotopo --help would wait for datasets
    from datasets import Dataset


@dataclass
class Predicted:
    """The rows of a prediction.

    Attributes:
        pairs: the run's.
        score: a jsonl file of responses to score; None to respond to prompts: those of the test
            split, or of the validation split where there is no test.
    """

    pairs: Pairs
    score: str | None

    @cached_property
    def responses(self) -> Responses:
        """What there is to score."""
        assert self.score is not None
        pairs = self.pairs
        if pairs.encoder.template.reads_clock and Path(self.score).is_file():
            pairs.stop_clock(sha256(Path(self.score)))
        strict = pairs.on_unwritten == "error"
        return Responses(self.score, pairs.encoder, strict, pairs.split_dialogues)

    @property
    def split(self) -> str:
        """Whose prompts there are to respond to.

        Raises:
            InputError: nothing is held out.
        """
        for name in ("test", "validation"):
            if name in self.pairs.of:
                return name
        raise InputError("data.test and data.validation are 0: there is no prompt to respond to.")

    @cached_property
    def tokens(self) -> "Dataset":
        """The rows as tokens, in the order of their source."""
        if self.score is None:
            return self.pairs.prompts(self.split)
        return self.responses.tokens

    def rows(self, ends: bool) -> Rows:
        """The rows as a module takes them.

        Args:
            ends: whether it reads the state of a response's last token.
        """
        behind = self.pairs.encoder.pad_id if ends and self.score is not None else None
        return Rows(self.tokens, behind=behind)

    def fingerprint(self, *settings: Any) -> str:
        """Hash of the rows, and of settings that divide them into batches."""
        from rotopo.data.token_cache import fingerprint_rows

        # The lines of a file say more than their tokens, and come out again.
        lines = self.responses.lines if self.score is not None else []
        rows, encoder = fingerprint_rows(self.tokens), self.pairs.encoder.fingerprint()
        facts = [rows, encoder, lines, *settings]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def line(self, row: int) -> dict[str, Any]:
        """What a line of predictions says beside the prediction itself.

        Args:
            row: its number, as in ``tokens``.
        """
        if self.score is not None:
            return self.responses.lines[row]
        preference = self.pairs.preference(self.split, row)
        labels = self.pairs.parts[self.split].labels([row])
        return {
            "row": row,
            **({"set": labels[row]} if labels else {}),
            "prompt": preference.prompt,
            **preference.inputs.columns,
        }
