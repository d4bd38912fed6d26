"""Files of external evaluations: the questions that each asks, and the answers that it reads.

Facts are from the evaluations' own code: AlpacaEval (tatsu-lab/alpaca_eval, README.md and
src/alpaca_eval/main.py), MT-Bench (lm-sys/FastChat, fastchat/llm_judge/common.py and
gen_model_answer.py), Arena-Hard (lmarena/arena-hard-auto, gen_answer.py and gen_judgment.py) and
IFEval (google-research/google-research, instruction_following_eval/evaluation_lib.py).
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rotopo.files import to_json, to_jsonl

Question = dict[str, Any]
# A question, the answers to its turns and the model's name -> what the evaluation reads.
Answer = Callable[[Question, Sequence[str], str], dict[str, Any]]

# MT-Bench's, by category, and of others; a question's own ``required_temperature`` comes first.
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's files.

    Attributes:
        name: its name.
        fields: which of a question's fields tell it from others'; the last holds what is asked.
        file: where it looks for answers; ``{model}`` stands for the model's name.
        answer: an answer as it reads it.
        temperature: a question's sampling temperature, where the evaluation sets it.
    """

    name: str
    fields: tuple[str, ...]
    file: str
    answer: Answer
    temperature: Callable[[Question], float] | None = None

    def written(self, answers: Sequence[tuple[Question, Sequence[str]]], model: str) -> str:
        """The text of its file of answers.

        Args:
            answers: questions, and the answers to their turns.
            model: its name.
        """
        records = [self.answer(question, turns, model) for question, turns in answers]
        return to_jsonl(records) if self.file.endswith(".jsonl") else to_json(records)


def evaluation_of(question: Question) -> Evaluation | None:
    """The evaluation that a question is of; None of none that is known."""
    return next((one for one in EVALUATIONS if all(f in question for f in one.fields)), None)


def _alpaca_eval(question: Question, turns: Sequence[str], model: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        name: question[name] for name in ("dataset", "datasplit") if name in question
    }
    # Stripped, as by its own generation.
    answer = {"instruction": question["instruction"], "output": turns[0].strip()}
    return {**about, **answer, "generator": model}


def _mt_bench(question: Question, turns: Sequence[str], model: str) -> dict[str, Any]:
    return {
        "question_id": question["question_id"],
        "answer_id": _id(question, turns, model),
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def _arena_hard(question: Question, turns: Sequence[str], model: str) -> dict[str, Any]:
    return {
        "uid": question["uid"],
        "ans_id": _id(question, turns, model),
        "model": model,
        "messages": [
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": {"answer": turns[0]}},
        ],
        "tstamp": time.time(),
    }


def _ifeval(question: Question, turns: Sequence[str], model: str) -> dict[str, Any]:
    return {"prompt": question["prompt"], "response": turns[0]}


def _id(question: Question, turns: Sequence[str], model: str) -> str:
    return hashlib.sha256(json.dumps([question, *turns, model]).encode()).hexdigest()[:22]


def _mt_bench_temperature(question: Question) -> float:
    category = _TEMPERATURES.get(question.get("category", ""), _TEMPERATURE)
    return question.get("required_temperature", category)


EVALUATIONS = (
    Evaluation("AlpacaEval", ("instruction",), "model_outputs.json", _alpaca_eval),
    Evaluation(
        "MT-Bench",
        ("question_id", "turns"),
        "model_answer/{model}.jsonl",
        _mt_bench,
        _mt_bench_temperature,
    ),
    Evaluation("Arena-Hard", ("uid", "prompt"), "model_answer/{model}.jsonl", _arena_hard),
    Evaluation(
        "IFEval",
        ("key", "instruction_id_list", "prompt"),
        "input_response_data.jsonl",
        _ifeval,
    ),
)
