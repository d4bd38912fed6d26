"""Files of scores, as ``rotopo predict`` with ``data.score`` writes them, of the same prompts."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rotopo.data.schemas import Message, read_response
from rotopo.errors import InputError
from rotopo.files import read_jsonl


@dataclass(frozen=True)
class Scores:
    """What a judge gave a policy's responses to n prompts, in the order of the prompts' rows.

    Attributes:
        rows: the prompts' rows.
        responses: the texts.
        tokens: their lengths in tokens [n].
        scores: [n].
    """

    rows: list[int]
    responses: list[str]
    tokens: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class _Line:
    """A line of a file of scores: where it stands, and what it says."""

    place: str
    prompt: list[Message]
    response: str
    tokens: int
    score: float


def read_scores(scores: dict[str, dict[str, Path]], baseline: str) -> dict[str, dict[str, Scores]]:
    """All files, over the same prompts, and each policy with the same responses for all judges."""
    judges = list(scores[baseline])
    if not judges:
        raise InputError(f"scores.{baseline} names no judge and no file.")
    first = _read(scores[baseline][judges[0]])
    rows = sorted(first)
    table: dict[str, dict[str, Scores]] = {}
    for policy, files in scores.items():
        if set(files) != set(judges):
            raise InputError(
                f"scores.{policy} has the judges {', '.join(files)}, and scores.{baseline} has "
                f"{', '.join(judges)}: give every policy a file of each."
            )
        table[policy] = {}
        responses: dict[int, _Line] = {}
        for name in judges:
            lines = _read(files[name])
            _check_prompts(lines, files[name], first, scores[baseline][judges[0]])
            responses = responses or lines
            for row in rows:
                if lines[row].response != responses[row].response:
                    raise InputError(
                        f"{lines[row].place}: another response than {responses[row].place}: the "
                        f"judges of {policy} scored different generations; score the same file."
                    )
            table[policy][name] = Scores(
                rows,
                [lines[row].response for row in rows],
                np.array([lines[row].tokens for row in rows]),
                np.array([lines[row].score for row in rows]),
            )
    return table


def _check_prompts(
    lines: dict[int, _Line], file: Path, expected: dict[int, _Line], expected_file: Path
) -> None:
    for here, there, lacking in (
        (expected, lines, file),
        (lines, expected, expected_file),
    ):
        missing = [row for row in here if row not in there]
        if missing:
            raise InputError(
                f"{lacking}: {len(missing)} prompts are missing, row {missing[0]} for one "
                f"({here[missing[0]].place}): all files have to hold the same prompts; let an "
                "unfinished run finish, or score the same rows."
            )
    for row, line in lines.items():
        if line.prompt != expected[row].prompt:
            raise InputError(
                f"{line.place}: row {row} has another prompt than {expected[row].place}: all "
                "files have to be of the same data."
            )


def _read(file: Path) -> dict[int, _Line]:
    """A file of scores by row."""
    lines: dict[int, _Line] = {}
    for number, value in read_jsonl(file):
        place = f"{file}, line {number}"
        try:
            prompt = read_response(value).prompt
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        for field, kinds, what in (
            ("row", int, "a whole number"),
            ("tokens", int, "a whole number"),
            ("score", (int, float), "a number"),
        ):
            if not isinstance(value.get(field), kinds) or isinstance(value[field], bool):
                raise InputError(
                    f"{place}: field {field!r} has to be {what}: is it a file of scores, written "
                    "by rotopo predict with data.score?"
                )
        if not math.isfinite(value["score"]):
            raise InputError(f"{place}: the score is {value['score']}: the judge has diverged.")
        if value["row"] in lines:
            raise InputError(
                f"{place}: row {value['row']} stands in {lines[value['row']].place} already."
            )
        lines[value["row"]] = _Line(
            place, prompt, value["response"], value["tokens"], float(value["score"])
        )
    if not lines:
        raise InputError(f"{file} holds no line.")
    return lines


def read_perplexity(file: Path) -> float:
    """The perplexity that the Perplexity callback has written."""
    try:
        return float(json.loads(file.read_text("utf-8"))["perplexity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not what the Perplexity callback writes (perplexity.json): {error!r}"
        ) from error
