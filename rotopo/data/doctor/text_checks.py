"""The data doctor's checks of what rows say: is every text where it belongs?"""

import json
from collections import Counter
from collections.abc import Iterator

from rotopo.data.dialogue import split_dialogue
from rotopo.data.doctor import limits
from rotopo.data.doctor.examination import (
    Examination,
    Finding,
    Sampled,
    Severity,
    found,
    graded,
)
from rotopo.data.messages import Message


def unwritten(examined: Examination) -> Iterator[Finding]:
    """Parts of rows that the chat template does not write: turns, by their roles, calls, tools.

    What a prompt's turns hold beside these, such as the reasoning of earlier turns, is counted.
    """
    patient = examined.patient
    refused = [part for part in patient.left_out.values() if part.refused]
    first = f" ({refused[0].first})" if refused else ""
    yield found(
        "unwritten",
        graded(bool(refused) and not patient.tolerated, bool(refused)),
        {
            "rows": sum(patient.outcomes.values()),
            **{f"without {label}": part.rows for label, part in patient.left_out.items()},
        },
        f"data.chat_template: give one that writes them, or change the rows{first}",
    )


def unread_columns(examined: Examination) -> Iterator[Finding]:
    """Columns of the source that mean nothing to the run: said, and nobody's mistake."""
    names = ", ".join(examined.patient.unread) or "none"
    yield Finding("columns", Severity.OK, {"that nothing reads": names})


def altered_turns(examined: Examination) -> Iterator[Finding]:
    """Turns of prompts whose text does not stand in the rendered prompt as it is, by role, on a
    sample: the template changes them, or writes a part."""
    by_role: Counter[str] = Counter()
    rows = []
    for s in examined.sample:
        rendered = _flat(examined.encoder.write(s.preference).prompt)
        altered = [
            turn["role"] for turn in s.preference.prompt if not _stands_in(_text(turn), rendered)
        ]
        by_role.update(altered)
        if altered:
            rows.append(s.row)
    first = min(rows, default=0)
    yield found(
        "altered turns",
        graded(False, len(rows) > limits.TEXT_LOST * len(examined.sample)),
        {
            "prompts sampled": len(examined.sample),
            **{f"turns of the {role}": n for role, n in by_role.items()},
        },
        f"data.chat_template: see whether it changes these turns on purpose (row {first} of train)",
    )


def _stands_in(text: str, rendered: str) -> bool:
    text = text.rpartition("</think>")[2]  # reasoning of earlier turns is another matter
    spellings = (text, json.dumps(text, ensure_ascii=False)[1:-1])
    return any(_flat(spelling) in rendered for spelling in spellings)


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
    responses = [_flat(_text(turns[0])) for _, turns, _ in sampled.responses]
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
    return turn.get("content", "")  # none where it only calls a tool


def _flat(text: str) -> str:
    return " ".join(text.split())
