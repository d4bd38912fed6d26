"""A dialogue that somebody has written into one text -> its turns."""

import re

from rotopo.data.messages import Message

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "instruction": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "response": "assistant",
}
# Instruction and response are words of many texts, which only the sharp signs make marks.
_MARK = r"((?:#+ *)?(?:system|human|user|assistant|ai|bot)|#+ *(?:instruction|response)) *:"


def split_dialogue(text: str) -> list[Message] | None:
    r"""The turns of a text that holds a dialogue with its speakers named, or None.

    A speaker's mark is a name with a colon at the beginning of a line: Human, User, ``###
    Instruction``; Assistant, AI, Bot, ``### Response``; System; in capitals or not, with ``###`` in
    front or not. It is a dialogue only if the text begins with a mark, each role has one name, and
    after a system turn, if there is one, user and assistant take turns and the user begins. Where
    marks after an empty line do (Anthropic HH), a name within a turn's lines is none. Marks
    within lines count where the text ends with the assistant's, as a rendered prompt does. ``Q:``
    and ``A:`` are no speakers: they are the examples of a prompt [ours, all of it].

    Args:
        text: what a turn says, or a whole row.

    Returns:
        At least one turn, contents without the white space around them. An assistant's mark with
        nothing after it at the text's end is left out: what follows is the response. Else the last
        turn may be the assistant's.
    """
    for line_begin in (r"\n\n", r"\n", r"\s"):
        before, *parts = re.split(rf"(?:\A\s*|{line_begin}){_MARK}", text, flags=re.IGNORECASE)
        names = [name.lstrip("# ").lower() for name in parts[::2]]
        turns = [
            {"role": _ROLES[name], "content": content.strip()}
            for name, content in zip(names, parts[1::2], strict=True)
        ]
        if before or not _take_turns(turns, names):
            continue
        open_end = turns[-1] == {"role": "assistant", "content": ""}
        if open_end:
            return turns[:-1]
        if line_begin != r"\s":
            return turns
    return None


def _take_turns(turns: list[Message], names: list[str]) -> bool:
    roles = [turn["role"] for turn in turns]
    if len(set(names)) > len(set(roles)):
        return False
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * len(spoken)
    return len(spoken) >= 2 and spoken == expected[: len(spoken)]
