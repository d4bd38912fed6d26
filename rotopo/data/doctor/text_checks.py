"""The data doctor's checks of what rows say: is every text where it belongs?"""

from collections.abc import Iterator

from rotopo.data.dialogue import split_dialogue
from rotopo.data.doctor import limits
from rotopo.data.doctor.examination import Examination, Finding, Sampled, found, graded
from rotopo.data.schemas import Message


def repeated_prompts(examined: Examination) -> Iterator[Finding]:
    """Responses that begin with the prompt, on a sample: it would be trained on as if the model
    had to write it."""
    sample = examined.sample
    rows = [s.row for s in sample if _repeats(s)]
    first = min(rows, default=0)
    yield found(
        "repeated prompts",
        graded(
            len(rows) > limits.MOST_REPEAT * len(sample),
            len(rows) > limits.SOME_REPEAT * len(sample),
        ),
        {
            "prompts sampled": len(sample),
            "repeated by the responses": len(rows),
            "share": len(rows) / max(1, len(sample)),
        },
        "data.source: cut the prompt off the responses; or set data.format to one that takes whole "
        rf"conversations apart ('hh' for texts with '\n\nHuman:') (row {first} of train)",
    )


def _repeats(sampled: Sampled) -> bool:
    """Whether each response of a row begins with its prompt, with or without a speaker's name."""
    beginnings = _beginnings(sampled.preference.prompt)
    responses = [_flat(_text(turns[0])) for turns, _ in sampled.responses]
    return bool(responses) and all(
        any(text in response[: limits.NAME + len(text)] for text in beginnings)
        for response in responses
    )


def _beginnings(prompt: list[Message]) -> list[str]:
    """What a response that repeats this prompt begins with: the last turn where it repeats that,
    the first where it repeats all, and the same of a dialogue inside a turn.

    Not what is so short that a response may well begin with it by itself: a greeting, a term.
    """
    texts = [_text(turn) for turn in (prompt[0], prompt[-1])]
    for text in texts[:]:
        inside = split_dialogue(text) or []
        texts += [turn["content"] for turn in (*inside[:1], *inside[-1:])]
    return [
        text
        for text in set(map(_flat, texts))
        if len(text.split()) >= limits.WORDS or len(text) >= limits.LETTERS
    ]


def dialogues(examined: Examination) -> Iterator[Finding]:
    """Turns of prompts that hold a whole dialogue, on a sample."""
    sample = examined.sample
    rows = [
        s.row
        for s in sample
        if any(
            turn["role"] != "assistant" and split_dialogue(_text(turn)) is not None
            for turn in s.preference.prompt
        )
    ]
    first = min(rows, default=0)
    yield found(
        "dialogues",
        graded(False, len(rows) > limits.DIALOGUES * len(sample)),
        {"prompts sampled": len(sample), "with a dialogue inside a turn": len(rows)},
        "data.split_dialogues: set it to true, and each speaker's text becomes a turn of its own "
        f"(row {first} of train)",
    )


def _text(turn: Message) -> str:
    return turn.get("content") or ""  # none where it only calls a tool


def _flat(text: str) -> str:
    return " ".join(text.split())
