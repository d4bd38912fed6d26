"""Chat messages as sources have them -> messages as a chat template takes them.

Sources differ in what a message looks like: a text, or a list of parts; null where there is none;
fields of every message that one of them needs, null in the others; the whole list as JSON text.
What a template may want of a message stays in it (``tool_calls``, ``name``, ``reasoning_content``,
anything); what rotopo cannot obey is refused by name.
"""

import ast
import json
from collections.abc import Iterator
from typing import Any

from rotopo.data.values import number, truth
from rotopo.errors import InputError
from rotopo.files import parse_json

# role, content (missing where it is null beside other fields), and whatever else it holds
Message = dict[str, Any]

# Parts of a content that are text, as the APIs that such messages come from name them.
_TEXT_PARTS = ("text", "input_text", "output_text")
# By these other trainers leave turns out of the loss, or weigh them.
_LOSS_FIELDS = frozenset(
    (
        *("train", "training", "trainable", "train_detail"),
        *("weight", "loss", "loss_weight", "loss_scale"),
    )
)
# Names of what is no text, of columns and of fields of messages.
MEDIA = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos")
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "observation": "tool",
    "function_call": "assistant",
}


def are_messages(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a text, parts, or null."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str | list | None)
            for turn in value
        )
    )


def is_speakers_turn(value: Any) -> bool:
    """Whether a value is a turn as sharegpt has it: from whom, and a text."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("from"), str)
        and isinstance(value.get("value"), str)
    )


def parsed(value: Any) -> Any:
    """The list or object that a text is as JSON; any other value, and any other text, as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value.strip())
        except ValueError:
            return value
    return value


def turns_in(value: Any) -> list[dict[str, Any]] | None:
    """The turns that a value is: messages or turns as sharegpt has them, one of them or a list, as
    they are or as a text of JSON or (pandas' csv files) of Python; None of anything else."""
    text = value if isinstance(value, str) else ""
    value = parsed(value)
    if isinstance(value, str) and any(name in text for name in ("'role'", "'from'")):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        return None
    known = all(
        (is_speakers_turn(turn) and turn["from"] in _SPEAKERS) or are_messages([turn])
        for turn in turns
    )
    # A text that names a role and no more may be anything.
    return turns if known and (not text or all(len(turn) > 1 for turn in turns)) else None


def is_assistants(turn: dict[str, Any]) -> bool:
    """Whether a turn, in either form, is the assistant's."""
    role = _SPEAKERS.get(turn["from"]) if is_speakers_turn(turn) else turn["role"]
    return role == "assistant"


def read_messages(value: list[dict[str, Any]], field: str) -> list[Message]:
    """Messages without what is null or empty, with parts joined to one text.

    A system turn without content is none at all. The assistant's may only call, and a tool may
    have nothing to say.

    Args:
        value: for which :func:`are_messages` holds.
        field: the column they stand in.

    Raises:
        InputError: a message holds images or the like, or has no content.
    """
    messages = []
    for turn in value:
        # Columns of structs give every message every key, null where it has none.
        fields = {"role": turn["role"]}
        fields |= {name: v for name, v in turn.items() if name != "content" and not is_nothing(v)}
        for name in MEDIA:
            if name in fields:
                raise InputError(
                    f"field {field!r}: a message has {name!r}, and text is all that is trained on: "
                    "remove the row, or set data.on_bad_row to 'drop'."
                )
        if isinstance(fields.get("tool_calls"), str):
            fields["tool_calls"] = parsed(fields["tool_calls"])
        content = _joined(turn.get("content"), field)
        if content is None and not (turn["role"] == "assistant" and len(fields) > 1):
            if turn["role"] == "system":
                continue
            if turn["role"] not in ("assistant", "tool"):
                raise InputError(f"field {field!r}: a turn of {turn['role']!r} has no content.")
            content = ""
        messages.append(fields if content is None else {**fields, "content": content})
    return messages


def read_speakers_turns(value: list[dict[str, Any]], field: str) -> list[Message]:
    """Turns as sharegpt has them, as messages. A call in JSON becomes a call of the message.

    Args:
        value: turns, for each of which :func:`is_speakers_turn` or :func:`are_messages` holds.
        field: the column they stand in.

    Raises:
        InputError: as :func:`read_messages`; an unknown speaker.
    """
    messages = []
    for turn in value:
        if is_speakers_turn(turn) and turn["from"] in _SPEAKERS:
            rest = {name: v for name, v in turn.items() if name not in ("from", "value")}
            message = {**rest, "role": _SPEAKERS[turn["from"]], "content": turn["value"]}
            if turn["from"] == "function_call" and (calls := _calls(turn["value"])):
                message |= {"content": None, "tool_calls": calls}
            messages.append(message)
        elif are_messages([turn]):
            messages.append(turn)
        else:
            raise InputError(
                f"field {field!r}: a turn has to be {{'from': ..., 'value': text}} with from one "
                f"of {', '.join(_SPEAKERS)}."
            )
    return read_messages(messages, field)


def without_loss_fields(turns: list[Message], field: str, response: bool) -> list[Message]:
    """Turns without the fields that say whether, or how much, they count in the loss.

    Every token of a response counts once, and none of a prompt: a field that says so is obeyed.

    Args:
        turns: of a prompt, or of a response.
        field: ``prompt``, ``chosen`` and so on.
        response: whether they are a response's.

    Raises:
        InputError: a field asks for anything else.
    """
    for turn in turns:
        for name in _LOSS_FIELDS & turn.keys():
            value = turn[name]
            asked = truth(value) if truth(value) is not None else number(value)
            if asked != response:
                kind, does = ("response", "counts once") if response else ("prompt", "never counts")
                raise InputError(
                    f"field {field!r}: a message has {name!r}: {value!r}, which is not obeyed: a "
                    f"{kind}'s turn {does} in the loss. Remove the field from the messages."
                )
    return [{name: v for name, v in turn.items() if name not in _LOSS_FIELDS} for turn in turns]


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def is_empty(turn: Message) -> bool:
    """Whether a turn says and calls nothing."""
    return not turn.get("content", "").strip() and turn.keys() <= {"role", "content"}


def with_parsed_arguments(messages: list[Message]) -> list[Message]:
    """Messages whose calls have their arguments as objects, where they are texts of them."""
    return [
        turn | {"tool_calls": [_with_parsed_arguments(call) for call in turn["tool_calls"]]}
        if isinstance(turn.get("tool_calls"), list)
        else turn
        for turn in messages
    ]


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return call | {"function": function | {"arguments": parsed(function["arguments"])}}


def text_of(message: Message) -> str:
    """A message as people read it: its content, and its calls as JSON."""
    calls = message.get("tool_calls")
    parts = [message.get("content", ""), json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(part for part in parts if part)


def is_nothing(value: Any) -> bool:
    """Whether a value is null or empty, or a list of such."""
    if isinstance(value, list):
        return all(map(is_nothing, value))
    return value is None or (isinstance(value, str | dict) and not value)


def _joined(content: str | list[Any] | None, field: str) -> str | None:
    """The text of a content; None of none."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise InputError(
                f"field {field!r}: a content has a part of type {kind!r}, which is no text, and "
                "text is all that is trained on: remove the row, or set data.on_bad_row to 'drop'."
            )
        texts.append(part["text"])
    return "".join(texts)


def _calls(text: str) -> list[dict[str, Any]] | None:
    """The calls that a text writes as JSON; None if it is something else."""
    value = parsed(text)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]
