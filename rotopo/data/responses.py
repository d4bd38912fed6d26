"""Responses in a file, to be scored: by a reward model, or by a policy's implicit reward."""

from typing import Any

from rotopo.data.preference import Preference
from rotopo.data.schemas import read_response
from rotopo.data.tokenized import Outcome
from rotopo.data.tokens import PairEncoder, Written
from rotopo.errors import InputError
from rotopo.files import read_jsonl


class Responses:
    """The lines of a jsonl file, each with a ``prompt`` and a ``response``, texts or messages; with
    ``tools`` and ``chat_template_kwargs``, if the prompt was given with them.

    ``rotopo predict`` writes such files. A response may be empty; other fields are left alone.

    Attributes:
        lines: what each line holds, with ``row`` (the line's number from 0) where it has none, and
            ``tokens`` of the response, its end of turn not counted, where it does not say them.
        tokens: columns ``prompt``, ``chosen`` (the response), ``rejected`` (nothing), ``row`` (the
            line's number).

    Args:
        file: the file.
        encoder: how to tokenise it.
        strict: whether what the chat template leaves out of a line is an error, if it matters.
        split_dialogues: as of :func:`rotopo.data.schemas.read_row`.

    Raises:
        InputError: no such file, a line that is not JSON, lacks a field, does not fit into
            ``data.max_length`` or is not written whole; names the line.
    """

    def __init__(
        self, file: str, encoder: PairEncoder, strict: bool = True, split_dialogues: bool = False
    ) -> None:
        from datasets import Dataset

        self.lines: list[dict[str, Any]] = []
        columns: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": [], "row": []}
        for number, line in read_jsonl(file):
            try:
                prompt, response, length = _encode(line, encoder, strict, split_dialogues)
            except InputError as error:
                raise InputError(f"{file}, line {number}: {error}") from error
            row = len(self.lines)
            self.lines.append({"row": row, "tokens": length} | line)
            for name, value in zip(columns, (prompt, response, [], row), strict=True):
                columns[name].append(value)
        if not self.lines:
            raise InputError(f"data.score: {file} holds no response.")
        self.tokens: Dataset = Dataset.from_dict(columns)


def written_whole(preference: Preference, encoder: PairEncoder, strict: bool) -> Written:
    """What the chat template writes of a line.

    Args:
        preference: the line's.
        encoder: which has the template.
        strict: whether what it leaves out is an error, if it matters.

    Raises:
        InputError: it leaves out something.
    """
    written = encoder.write(preference)
    for part in encoder.unwritten(preference, written):
        if part.refused and strict:
            raise InputError(
                f"{part}: give a template that does (data.chat_template), or set data.on_unwritten "
                "to 'warn'."
            )
    return written


def _encode(
    line: dict[str, Any], encoder: PairEncoder, strict: bool, split_dialogues: bool
) -> tuple[list[int], list[int], int]:
    """Token ids of a line's prompt and response, and how many tokens the whole response has."""
    preference = read_response(line, split_dialogues)
    whole = encoder.tokenize(written_whole(preference, encoder, strict))
    cut, outcome = encoder.truncate(whole)
    if outcome == Outcome.TOO_LONG:
        raise InputError(
            f"over data.max_length ({encoder.max_length} tokens): raise it, or let data.truncation "
            "cut."
        )
    return cut.prompt, cut.chosen, len(whole.chosen) - 1
