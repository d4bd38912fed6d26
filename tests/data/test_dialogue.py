"""Dialogues inside one text are taken apart, and other texts are left alone."""

import pytest

from rotopo.data.dialogue import split_dialogue
from rotopo.data.schemas import FORMATS

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    spoken = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return spoken if system is None else [{"role": "system", "content": system}, *spoken]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HUMAN}a{ASSISTANT}b{HUMAN}c\n\nAssistant:", turns("a", "b", "c")),
        (f"{HUMAN}a\n\nb{ASSISTANT}c", turns("a\n\nb", "c")),
        (f"{HUMAN}{ASSISTANT}b", turns("", "b")),
        ("User: a\nAssistant: b\nUser: c", turns("a", "b", "c")),
        ("Human: a\nAI: b\n\nHuman: c\nAI:", turns("a", "b", "c")),
        ("### Human: a\n### Assistant: b\n### Human: c", turns("a", "b", "c")),
        ("### Instruction:\na\n\n### Response:\n", turns("a")),
        ("SYSTEM: s\nUSER: a\nASSISTANT: b\nUSER: c", turns("a", "b", "c", system="s")),
        ("Human: Where is Oslo? Assistant:", turns("Where is Oslo?")),
        ("user: a assistant: b user: c assistant: ", turns("a", "b", "c")),
        # A chat that somebody quotes stays in the turn that quotes it.
        (f"{HUMAN}x\nUser: y\nAI: z{ASSISTANT}b", turns("x\nUser: y\nAI: z", "b")),
    ],
)
def test_dialogues(text, expected):
    assert split_dialogue(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Where is Oslo?",
        "Human: where is Oslo?",
        "Human: where is Oslo?\n\nHuman: where?\n\nAssistant:",
        "Continue this.\n\nHuman: a\n\nAssistant: b",
        "In 'Human: a', what does Human: mean? Assistant:",
        "Human: what does Assistant: mean?",
        "Assistant: a\n\nHuman: b",
        "Q: 1 + 1?\nA: 2\nQ: 2 + 2?\nA:",
        "Instruction: a\nResponse: b",
        "Human rights: a\nAssistant: b",
        "Human: a\nBot: b\nUser: c\nBot: d",
        "System: a\nAssistant: b",
    ],
)
def test_other_texts_are_no_dialogue(text):
    assert split_dialogue(text) is None


def test_a_dialogue_of_hh_has_the_turns_of_the_format():
    prompt = f"{HUMAN}a \n{ASSISTANT}{HUMAN} c: d\nHuman: e"
    row = {"chosen": f"{prompt}{ASSISTANT} f", "rejected": f"{prompt}{ASSISTANT}g"}
    read = FORMATS["hh"].read(row)
    assert split_dialogue(f"{prompt}\n\nAssistant:") == read.prompt
    assert split_dialogue(row["chosen"]) == read.prompt + read.chosen
