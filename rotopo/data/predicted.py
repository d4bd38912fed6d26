"""What ``predict`` works on: the prompts of a held-out split, or of a file, or the responses of a
file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotopo.data.batch import PromptBatch
from rotopo.data.pairs import Pairs
from rotopo.data.prompts import Answers, Generate, Prompts, decoded
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
        score: a jsonl file of responses to score; None to respond to prompts.
        prompts: a file of prompts to respond to; None responds to those of the test split, or of
            the validation split where there is no test.
        answers_as: the model's name in an evaluation's file of answers; None for one by default.

    Raises:
        InputError: both files are named, or the name is none of a file.
    """

    pairs: Pairs
    score: str | None = None
    prompts: str | None = None
    answers_as: str | None = None

    def __post_init__(self) -> None:
        if self.score is not None and self.prompts is not None:
            raise InputError(
                "data.score and data.prompts: one is a file of responses to score, the other of "
                "prompts to respond to: name one of them."
            )
        if self.answers_as is not None and ("/" in self.answers_as or not self.answers_as):
            raise InputError(
                f"data.answers_as is {self.answers_as!r}: evaluations look for a file of this "
                "name, in which there can be no /."
            )

    @cached_property
    def given(self) -> Responses | Prompts | None:
        """What the file holds; None where none is named."""
        file = self.score or self.prompts
        if file is None:
            return None
        pairs = self.pairs
        if pairs.encoder.template.reads_clock and Path(file).is_file():
            pairs.stop_clock(sha256(Path(file)))
        settings = (file, pairs.encoder, pairs.on_unwritten == "error", pairs.split_dialogues)
        if self.score is not None:
            return Responses(*settings)
        prompts = Prompts(*settings)
        pairs.say(f"data.prompts: {file}: {prompts.summary()}.")
        return prompts

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
        return self.pairs.prompts(self.split) if self.given is None else self.given.tokens

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
        lines = [] if self.given is None else self.given.lines
        rows, encoder = fingerprint_rows(self.tokens), self.pairs.encoder.fingerprint()
        facts = [rows, encoder, lines, *settings]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def line(self, row: int) -> dict[str, Any]:
        """What a line of predictions says beside the prediction itself.

        Args:
            row: its number, as in ``tokens``.
        """
        if isinstance(self.given, Responses):
            return self.given.lines[row]
        if self.given is not None:
            return self.given.line(row)
        preference = self.pairs.preference(self.split, row)
        labels = self.pairs.parts[self.split].labels([row])
        return {
            "row": row,
            **({"set": labels[row]} if labels else {}),
            "prompt": preference.prompt,
            **preference.inputs.columns,
        }

    def respond(self, batch: PromptBatch, generate: Generate) -> list[dict[str, Any]]:
        """Responses to a batch of the prompts, each with its number of tokens.

        Args:
            batch: of the prompts.
            generate: responds to a batch.
        """
        if isinstance(self.given, Prompts):
            return self.given.respond(batch, generate)
        return decoded(self.pairs.encoder, generate(batch))

    def answers(self, lines: Sequence[dict[str, Any]], model: str) -> Answers | None:
        """The answers that an evaluation reads; None where there is no evaluation.

        Args:
            lines: of the responses' file.
            model: the model's name, where ``answers_as`` has none.
        """
        if not isinstance(self.given, Prompts):
            return None
        return self.given.answers(lines, self.answers_as or model)
