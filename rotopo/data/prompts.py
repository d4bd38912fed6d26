"""Prompts in a file, to be responded to: an evaluation's questions, or any."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rotopo.data.batch import PromptBatch, collate_prompts
from rotopo.data.evaluations import EVALUATIONS, Evaluation, evaluation_of
from rotopo.data.messages import Message
from rotopo.data.preference import Preference
from rotopo.data.responses import written_whole
from rotopo.data.rows import prompts_alone
from rotopo.data.schemas import read_response
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from rotopo.files import parse_json, read_jsonl, read_lines

if TYPE_CHECKING:  # else rotopo --help would wait for datasets
    from datasets import Dataset

# Prompts -> the token ids of a response to each, without the token that ends it.
Generate = Callable[[PromptBatch], list[list[int]]]


class Answers(NamedTuple):
    """An evaluation's name, the file in which it looks for answers, and that file's text."""

    evaluation: str
    file: str
    text: str


class Prompts:
    """The prompts of a json or jsonl file: those of an evaluation, which is told by the fields of
    its questions (:mod:`rotopo.data.evaluations`), or in a field ``prompt``, as text or messages,
    with ``tools`` and ``chat_template_kwargs``, if they are given with them.

    A question of several turns is answered turn by turn: what was answered is in the next prompt.

    Attributes:
        evaluation: whose they are; None of no known one.
        lines: what the file says of each.
        prompts: each with the user's first turn.
        later: the user's further turns, as many for each.
        temperatures: at which each is answered, where the evaluation says so.

    Args:
        file: the file.
        encoder: how to tokenise them.
        strict: whether what the chat template leaves out of a prompt is an error, if it matters.
        split_dialogues: as of :func:`rotopo.data.schemas.read_row`; not in an evaluation.

    Raises:
        InputError: no such file, what it holds is not JSON, or a prompt cannot be read, is not
            written whole or does not fit into ``data.max_length``; names the line.
    """

    def __init__(
        self, file: str, encoder: PairEncoder, strict: bool = True, split_dialogues: bool = False
    ) -> None:
        self.encoder = encoder
        self.evaluation: Evaluation | None = None
        self.lines: list[dict[str, Any]] = []
        self.prompts: list[Preference] = []
        self.later: list[list[str]] = []
        self.temperatures: list[float] = []
        self._ids: list[list[int]] = []
        for place, line in _entries(file):
            try:
                if not self.lines:
                    self.evaluation = evaluation_of(line)
                self._take(line, strict, split_dialogues)
            except InputError as error:
                raise InputError(f"data.prompts: {file}, {place}: {error}") from error
        if not self.lines:
            raise InputError(f"data.prompts: {file} holds no prompt.")

    def _take(self, line: dict[str, Any], strict: bool, split_dialogues: bool) -> None:
        later: list[str] = []
        if self.evaluation is None:
            try:
                prompt = read_response({**line, "response": ""}, split_dialogues)
            except InputError as error:
                known = "; ".join(f"{e.name}: {', '.join(e.fields)}" for e in EVALUATIONS)
                raise InputError(
                    f"{error} (A prompt stands in a field 'prompt', and the evaluations that are "
                    f"known have the fields {known}.)"
                ) from error
            prompt = replace(prompt, chosen=None)
        else:
            first, *later = _asked(line, self.evaluation)
            prompt = Preference([{"role": "user", "content": first}], None, None)
            for turn in later:  # what is wrong with one is said now
                self.encoder.encode_prompt([{"role": "user", "content": turn}])
            if self.evaluation.temperature is not None:
                self.temperatures.append(_temperature(self.evaluation.temperature(line)))
        if self.later and len(later) != len(self.later[0]):
            raise InputError(
                f"{len(later) + 1} turns, but the first question has {len(self.later[0]) + 1}: put "
                "questions of as many turns into a file of their own."
            )
        ids = self.encoder.tokenize(written_whole(prompt, self.encoder, strict)).prompt
        if len(ids) > self.encoder.max_length:
            raise InputError(
                f"the prompt has {len(ids)} tokens, and data.max_length is "
                f"{self.encoder.max_length}: raise it, since no question is cut."
            )
        self.lines.append(line)
        self.prompts.append(prompt)
        self.later.append(later)
        self._ids.append(ids)

    @cached_property
    def tokens(self) -> "Dataset":
        """Columns ``prompt``, ``chosen`` and ``rejected`` (nothing), ``row`` (from 0)."""
        return prompts_alone(self._ids, range(len(self._ids)))

    def summary(self) -> str:
        """How many prompts there are, and of what kind."""
        n = len(self.lines)
        if self.evaluation is None:
            return f"{n} prompts"
        found = f"{n} questions of {self.evaluation.name}"
        if self.later[0]:
            found += f", of {len(self.later[0]) + 1} turns each"
        if self.temperatures:
            low, high = min(self.temperatures), max(self.temperatures)
            own = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            found += f", at its temperatures ({own}) instead of model.sampling.temperature"
        return found

    def line(self, row: int) -> dict[str, Any]:
        """What stands beside a response: of an evaluation's question the prompt, of any other
        prompt all that its line says."""
        prompt = self.prompts[row]
        own = {} if self.evaluation is not None else self.lines[row]
        return {"row": row, **own, "prompt": prompt.prompt, **prompt.inputs.columns}

    def respond(self, batch: PromptBatch, generate: Generate) -> list[dict[str, Any]]:
        """Responses to a batch of prompts, and to the turns that follow.

        Args:
            batch: of first turns.
            generate: responds to a batch.

        Returns:
            For each row ``response`` and ``tokens``; where there are several turns, of the last
            one, with ``prompt``, the dialogue before it, and ``earlier_tokens``.
        """
        rows, device = batch.rows.tolist(), batch.rows.device
        temperatures = None
        if self.temperatures:
            temperatures = torch.tensor([self.temperatures[row] for row in rows], device=device)
        dialogues = [list(self.prompts[row].prompt) for row in rows]
        found: list[dict[str, Any]] = []
        lengths: list[list[int]] = [[] for _ in rows]
        for turn in range(len(self.later[0]) + 1):
            if turn:
                for row, dialogue, line in zip(rows, dialogues, found, strict=True):
                    dialogue += self._next(row, turn, line["response"])
                ids = [
                    self.encoder.encode_prompt(dialogue, self.prompts[row].inputs)
                    for row, dialogue in zip(rows, dialogues, strict=True)
                ]
                # Numbers of their own, since what is drawn follows from them.
                numbers = [row + turn * len(self.lines) for row in rows]
                batch = collate_prompts(ids, self.encoder.pad_id, numbers).to(device)
            responses = generate(replace(batch, temperatures=temperatures))
            found = decoded(self.encoder, responses)
            for own, line in zip(lengths, found, strict=True):
                own.append(line["tokens"])
        if not self.later[0]:
            return found
        return [
            {"prompt": dialogue, **line, "earlier_tokens": own[:-1]}
            for dialogue, line, own in zip(dialogues, found, lengths, strict=True)
        ]

    def _next(self, row: int, turn: int, response: str) -> list[Message]:
        """The turns that follow the user's: the answer, as FastChat writes it, and the next one."""
        answer = self.encoder.without_control_tokens(response).strip()
        return [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": self.later[row][turn - 1]},
        ]

    def answers(self, lines: Sequence[dict[str, Any]], model: str) -> Answers | None:
        """What the evaluation reads; None without one.

        Args:
            lines: of the responses' file.
            model: the model's name.
        """
        if self.evaluation is None:
            return None
        answers = []
        for line in lines:
            before = [turn["content"] for turn in line["prompt"] if turn["role"] == "assistant"]
            last = line["response"].strip() if before else line["response"]
            answers.append((self.lines[line["row"]], [*before, last]))
        file = self.evaluation.file.format(model=model)
        return Answers(self.evaluation.name, file, self.evaluation.written(answers, model))


def decoded(encoder: PairEncoder, responses: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Responses as text, and how many tokens they have.

    Args:
        encoder: whose tokenizer knows them.
        responses: their token ids.
    """
    decode = encoder.tokenizer.decode
    return [
        {"response": decode(ids, skip_special_tokens=True), "tokens": len(ids)} for ids in responses
    ]


def _entries(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, and where each stands."""
    first = next((line for line in read_lines(file) if line.strip()), "")
    if not first.lstrip().startswith("["):
        for number, value in read_jsonl(file):
            yield f"line {number}", value
        return
    try:
        values = parse_json("".join(read_lines(file)).strip(), finite=True)
    except ValueError as error:
        raise InputError(f"data.prompts: {file}: not JSON: {error}") from error
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise InputError(f"data.prompts: {file}, entry {number} (from 0): not a JSON object.")
        yield f"entry {number} (from 0)", value


def _asked(line: dict[str, Any], evaluation: Evaluation) -> list[str]:
    """The user's turns of an evaluation's question."""
    for field in evaluation.fields:
        if field not in line:
            raise InputError(f"there is no field {field!r}, which {evaluation.name}'s have.")
    if line.get("input"):
        raise InputError("field 'input': AlpacaEval's questions have none beside the instruction.")
    field = evaluation.fields[-1]
    asked = line[field]
    turns = asked if isinstance(asked, list) else [asked]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        kind = "texts" if field == "turns" else "a text"
        raise InputError(f"field {field!r}: expected {kind}, found {asked!r:.60}.")
    return turns


def _temperature(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InputError(f"field 'required_temperature': {value!r} is no temperature.")
    return float(value)
