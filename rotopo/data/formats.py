"""One small function per public row format: row -> :class:`~rotopo.data.preference.Preference`.

A new format is a function of one row. Named by its dotted path it works at once
(``format: my_package.my_module.my_function``); in :data:`FORMATS`, with the columns it needs, it
is also detected.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rotopo.data.messages import (
    MEDIA,
    Message,
    are_messages,
    is_assistants,
    is_empty,
    is_speakers_turn,
    parsed,
    read_speakers_turns,
    turns_in,
)
from rotopo.data.preference import Preference, Row
from rotopo.data.values import number, truth
from rotopo.errors import InputError

# Columns that every format reads beside its own.
COMMON_COLUMNS = ("tools", "chat_template_kwargs")
# Which responses of a prompt a pair holds, see rotopo.data.reward_bench_2; the test reads it.
PLACE = "reward_bench_2"


@dataclass(frozen=True)
class Kind:
    """What the values of a column have to be: in words, and as a test of one."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Format:
    """A row format.

    Attributes:
        name: its name in :data:`FORMATS`, or a dotted path.
        read: row -> Preference.
        columns: the columns that it needs, and what their values have to be.
        optional: columns that it reads where they are there.
        without: columns whose presence says that the rows are of another format.
        rather_than: formats which would take these rows for something simpler.
    """

    name: str
    read: Callable[[Row], Preference]
    columns: Mapping[str, Kind]
    optional: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    rather_than: tuple[str, ...] = ()

    @property
    def source_file(self) -> str:
        """Path of the Python file that defines it."""
        return inspect.getfile(self.read)

    @property
    def needs(self) -> str:
        """Its columns, in words."""
        return "; ".join(f"{column}: {kind.words}" for column, kind in self.columns.items())

    def misfit(self, columns: list[str], rows: list[Row]) -> str | None:
        """Why rows are not of this format: a column, or the row and the field; None if they are.

        Args:
            columns: of the source.
            rows: its first rows. Values that are missing say nothing.
        """
        for column in self.columns:
            if column not in columns:
                return f"there is no column {column!r}"
        for column in self.without:
            if column in columns:
                return f"there is a column {column!r}, which its rows have none of"
        for place, row in enumerate(rows):
            for column, kind in self.columns.items():
                if row[column] is not None and not kind.holds(row[column]):
                    found = f"{row[column]!r:.60}"
                    return f"row {place} (from 0), field {column!r}: {found} is not {kind.words}"
        return None

    def unread(self, columns: list[str]) -> list[str]:
        """Those of the source's columns that have no meaning to it; none for a user's function,
        of which nobody knows what it reads."""
        known = self.known
        return [c for c in columns if c not in (*known, PLACE, *MEDIA)] if known else []

    @property
    def known(self) -> list[str]:
        """The columns that it reads; none for a user's function, of which nobody knows."""
        return [*self.columns, *self.optional, *COMMON_COLUMNS] if self.name in FORMATS else []


def explicit(row: Row) -> Preference:
    """``prompt``, ``chosen``, ``rejected``, each a text or a list of messages."""
    chosen, rejected = read_responses(row, "chosen", "rejected", beside="prompt")
    return Preference(read_prompt(row, "prompt"), chosen, rejected)


def implicit(row: Row) -> Preference:
    """``chosen`` and ``rejected`` as whole conversations; what they share is the prompt."""
    return _split(_conversation(row, "chosen"), _conversation(row, "rejected"))


def ultrafeedback(row: Row) -> Preference:
    """UltraFeedback-binarized: as ``implicit``, and the user's turn a second time in ``prompt``."""
    preference = implicit(row)
    prompt = _text(row, "prompt").strip()
    if all(message.get("content", "").strip() != prompt for message in preference.prompt):
        raise InputError(
            "field 'prompt': it is none of the turns that chosen and rejected share; set "
            "data.format to 'implicit' to leave it unread."
        )
    return preference


def hh(row: Row) -> Preference:
    r"""Anthropic HH: conversations as one text with ``\n\nHuman:`` and ``\n\nAssistant:``."""
    return _split(_dialogue(row, "chosen"), _dialogue(row, "rejected"))


def align_anything(row: Row) -> Preference:
    """align-anything: ``question``, two responses, and the number of the better one."""
    label = number(row.get("overall_response"))
    if label not in (1, 2):
        raise InputError(
            f"field 'overall_response': {row.get('overall_response')!r} is neither 1 nor 2."
        )
    better, worse = (1, 2) if label == 1 else (2, 1)
    chosen, rejected = read_responses(row, f"response_{better}", f"response_{worse}")
    return Preference(read_prompt(row, "question"), chosen, rejected)


def sharegpt(row: Row) -> Preference:
    """LLaMA-Factory's sharegpt pairs: ``conversations``, then ``chosen`` and ``rejected`` turns.

    An optional ``system`` column holds the system message, unless the conversation begins with
    one.
    """
    turns = parsed(required(row, "conversations"))
    if not isinstance(turns, list):
        raise InputError(f"field 'conversations': expected a list of turns, found {turns!r:.40}.")
    prompt = read_speakers_turns(turns, "conversations")
    system = _text(row, "system") if row.get("system") else None
    if system and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    chosen, rejected = (
        read_speakers_turns([parsed(required(row, name))], name) for name in ("chosen", "rejected")
    )
    return Preference(prompt, chosen, rejected)


def kto(row: Row) -> Preference:
    """Unpaired: ``prompt`` and ``completion``, texts or messages, and a true or false ``label``."""
    label = truth(row.get("label"))
    if label is None:
        raise InputError(f"field 'label': {row.get('label')!r} is neither true nor false.")
    (completion,) = read_responses(row, "completion", beside="prompt")
    if all(map(is_empty, completion)):
        raise InputError("field 'completion': the response is empty.")
    prompt = read_prompt(row, "prompt")
    return Preference(prompt, completion, None) if label else Preference(prompt, None, completion)


def messages(row: Row) -> Preference:
    """For supervised fine-tuning: ``messages``, a whole conversation, of which the assistant's last
    turn is the response, and what comes before it the prompt. Unpaired, and desirable."""
    turns = _conversation(row, "messages")
    shared = len(turns)
    while shared > 0 and turns[shared - 1]["role"] == "assistant":
        shared -= 1
    if shared == len(turns):
        raise InputError("field 'messages': the last turn is not the assistant's.")
    return Preference(turns[:shared], turns[shared:], None)


def read_responses(row: Row, *fields: str, beside: str | None = None) -> list[list[Message]]:
    """Responses to one prompt. All of them are messages kept as text, or none: an answer may be
    JSON too.

    Args:
        row: the row.
        fields: their columns.
        beside: the prompt's column.

    Raises:
        InputError: one is missing, empty, or neither a text nor the assistant's messages.
    """
    values = [required(row, field) for field in fields]
    turns = [turns_in(value) for value in values]
    if all(found and all(map(is_assistants, found)) for found in turns):
        return [read_speakers_turns(f or [], n) for f, n in zip(turns, fields, strict=True)]
    if beside is not None and turns_in(row.get(beside)) is not None:
        for field, found in zip(fields, turns, strict=True):
            if found is not None and isinstance(row[field], str):
                raise InputError(
                    f"field {field!r}: messages as text, which are not the assistant's alone in "
                    "all responses: write them as the prompt's are written."
                )
    values = [v if isinstance(v, str) else f or v for v, f in zip(values, turns, strict=True)]
    return [_turns(value, field, "assistant") for value, field in zip(values, fields, strict=True)]


def read_prompt(row: Row, field: str) -> list[Message]:
    """The prompt in a column, a text or messages.

    Raises:
        InputError: it is missing, or neither.
    """
    value = required(row, field)
    return _turns(turns_in(value) or value, field, "user")


def required(row: Row, field: str) -> Any:
    """A column's value.

    Raises:
        InputError: there is none.
    """
    value = row.get(field)
    if value is None:
        raise InputError(f"field {field!r} is missing.")
    return value


def _split(chosen: list[Message], rejected: list[Message]) -> Preference:
    """Two conversations at the end of what they share, before the assistant's turns there."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def _dialogue(row: Row, field: str) -> list[Message]:
    """The turns of an HH text."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", _text(row, field))
    if before.strip() or not parts:
        raise InputError(rf"field {field!r}: it does not begin with '\n\nHuman:'.")
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _text(row: Row, field: str) -> str:
    value = required(row, field)
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: expected a text, found a {type(value).__name__}.")
    return value


def _conversation(row: Row, field: str) -> list[Message]:
    turns = turns_in(required(row, field))
    if turns is None:
        raise _no_messages(field)
    return read_speakers_turns(turns, field)


def _turns(value: Any, field: str, role: str) -> list[Message]:
    """Messages as they are, or a text as one turn."""
    if isinstance(value, str):
        if role == "assistant" and not value.strip():
            raise InputError(f"field {field!r}: the response is empty.")
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise InputError(
            f"field {field!r}: expected a text or a list of messages, found {value!r:.40}."
        )
    if turns_in(value) is None:
        raise _no_messages(field)
    return read_speakers_turns(value, field)


def _no_messages(field: str) -> InputError:
    return InputError(
        f"field {field!r}: expected a list of messages, each with a role and a content: a text, or "
        "a list of parts."
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_conversation(value: Any) -> bool:
    turns = turns_in(value)
    return turns is not None and not all(map(is_assistants, turns))


def _is_response(value: Any) -> bool:
    turns = turns_in(value)
    return turns is not None and all(map(is_assistants, turns))


def _are_speakers_turns(value: Any) -> bool:
    value = parsed(value)
    return isinstance(value, list) and all(map(_is_speakers_turn, value))


def _is_speakers_turn(value: Any) -> bool:
    value = parsed(value)
    return is_speakers_turn(value) or are_messages([value])


_TEXT = Kind("a text", _is_text)
_PROMPT = Kind("a text or a list of messages", lambda v: _is_text(v) or turns_in(v) is not None)
_RESPONSE = Kind(
    "a text or a list of the assistant's messages", lambda v: _is_text(v) or _is_response(v)
)
_CONVERSATION = Kind("a whole conversation as a list of messages", _is_conversation)
_DIALOGUE = Kind(
    r"a whole conversation as a text with '\n\nHuman:' and '\n\nAssistant:'",
    lambda v: _is_text(v) and "\n\nHuman:" in v and "\n\nAssistant:" in v,
)
_TURN = Kind("a turn {from, value}", _is_speakers_turn)
_PAIR = ("chosen", "rejected")

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("explicit", explicit, {"prompt": _PROMPT, **dict.fromkeys(_PAIR, _RESPONSE)}),
        Format("implicit", implicit, dict.fromkeys(_PAIR, _CONVERSATION), without=("prompt",)),
        Format(
            "ultrafeedback",
            ultrafeedback,
            {"prompt": _TEXT, **dict.fromkeys(_PAIR, _CONVERSATION)},
            rather_than=("explicit",),  # of conversations in JSON
        ),
        Format("hh", hh, dict.fromkeys(_PAIR, _DIALOGUE)),
        Format(
            "align_anything",
            align_anything,
            {
                **dict.fromkeys(("question", "response_1", "response_2"), _TEXT),
                "overall_response": Kind("1 or 2", lambda v: number(v) is not None),
            },
        ),
        Format(
            "sharegpt",
            sharegpt,
            {
                "conversations": Kind("a list of turns {from, value}", _are_speakers_turns),
                **dict.fromkeys(_PAIR, _TURN),
            },
            optional=("system",),
        ),
        Format(
            "kto",
            kto,
            {
                "prompt": _PROMPT,
                "completion": _RESPONSE,
                "label": Kind("true or false", lambda v: truth(v) is not None),
            },
        ),
        Format(
            "messages",
            messages,
            {"messages": _CONVERSATION},
            without=(*_PAIR, "completion", "response"),
        ),
    )
}
