"""One small function per public row format: row -> :class:`Preference`.

A new format is a function of one row. Named by its dotted path it works at once
(``format: my_package.my_module.my_function``); in :data:`FORMATS`, with the columns it needs, it
is also detected.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rotopo.errors import InputError

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset

Message = dict[str, str]  # role and content
Row = Mapping[str, Any]

_DETECTION_ROWS = 20


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, as chat messages; or one, of unpaired data.

    Attributes:
        prompt: at least one turn, the last of them not the assistant's.
        chosen: the preferred response: one assistant turn, or several in a row. Of unpaired data
            a desirable response, or None.
        rejected: the other response. Of unpaired data an undesirable response, or None.
        extra: further responses, by the name of their role (``gold``, ``reference_sample``).
    """

    prompt: list[Message]
    chosen: list[Message] | None
    rejected: list[Message] | None
    extra: dict[str, list[Message]] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A row format.

    Attributes:
        name: its name in :data:`FORMATS`, or a dotted path.
        read: row -> Preference.
        columns: for each column it needs, whether a value is of the right kind.
        needs: the same in words, for error messages.
        without: columns whose presence says that the rows are of another format.
    """

    name: str
    read: Callable[[Row], Preference]
    columns: dict[str, Callable[[Any], bool]]
    needs: str
    without: tuple[str, ...] = ()

    @property
    def source_file(self) -> str:
        """Path of the Python file that defines it."""
        return inspect.getfile(self.read)

    def fits(self, columns: list[str], rows: list[Row]) -> bool:
        """Whether the columns are there and the rows' values, where present, of the right kind."""
        return (
            all(column in columns for column in self.columns)
            and not any(column in columns for column in self.without)
            and all(
                is_kind(row[column])
                for row in rows
                for column, is_kind in self.columns.items()
                if row[column] is not None
            )
        )


def explicit(row: Row) -> Preference:
    """``prompt``, ``chosen``, ``rejected``, each a text or a list of messages."""
    return Preference(
        _turns(row, "prompt", "user"),
        _turns(row, "chosen", "assistant"),
        _turns(row, "rejected", "assistant"),
    )


def implicit(row: Row) -> Preference:
    """``chosen`` and ``rejected`` as whole conversations; what they share is the prompt."""
    return _split(_messages(row, "chosen"), _messages(row, "rejected"))


def ultrafeedback(row: Row) -> Preference:
    """UltraFeedback-binarized: as ``implicit``, and the user's turn a second time in ``prompt``."""
    preference = implicit(row)
    prompt = _text(row, "prompt").strip()
    if all(message["content"].strip() != prompt for message in preference.prompt):
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
    label = row.get("overall_response")
    if isinstance(label, bool) or label not in (1, 2, "1", "2"):
        raise InputError(f"field 'overall_response': {label!r} is neither 1 nor 2.")
    better, worse = (1, 2) if int(label) == 1 else (2, 1)
    return Preference(
        _turns(row, "question", "user"),
        _turns(row, f"response_{better}", "assistant"),
        _turns(row, f"response_{worse}", "assistant"),
    )


def sharegpt(row: Row) -> Preference:
    """LLaMA-Factory's sharegpt pairs: ``conversations``, then ``chosen`` and ``rejected`` turns.

    An optional ``system`` column holds the system message, unless the conversation begins with
    one. Rows with ``tools`` are refused: how tools enter the prompt is the template's affair.
    """
    if row.get("tools"):
        raise InputError("field 'tools': tools are not supported; drop the row or write a format.")
    turns = _required(row, "conversations")
    if not isinstance(turns, list):
        raise InputError(f"field 'conversations': expected a list of turns, found {turns!r:.40}.")
    prompt = [_from_sharegpt(turn, "conversations") for turn in turns]
    system = _text(row, "system") if row.get("system") else None
    if system and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    return Preference(
        prompt,
        [_from_sharegpt(_required(row, "chosen"), "chosen")],
        [_from_sharegpt(_required(row, "rejected"), "rejected")],
    )


def kto(row: Row) -> Preference:
    """Unpaired: ``prompt`` and ``completion``, texts or messages, and a true or false ``label``."""
    label = row.get("label")
    if label not in (0, 1):
        raise InputError(f"field 'label': {label!r} is neither true nor false.")
    completion = _turns(row, "completion", "assistant")
    if not any(turn["content"].strip() for turn in completion):
        raise InputError("field 'completion': the response is empty.")
    prompt = _turns(row, "prompt", "user")
    return Preference(prompt, completion, None) if label else Preference(prompt, None, completion)


def read_row(
    row_format: Format, row: Row, extra_responses: Mapping[str, str] | None = None
) -> Preference:
    """The preference in one row.

    Args:
        row_format: how to read it.
        row: the row.
        extra_responses: column of each further response, by the name of its role.

    Raises:
        InputError: a column is missing, a value is of the wrong kind, a response is empty, both
            responses are equal, or the turns are not a prompt and assistant responses. Names the
            field; :func:`naming_row` adds the row.
    """
    preference = row_format.read(row)
    for role, column in (extra_responses or {}).items():
        preference.extra[role] = _turns(row, column, "assistant")
    _check(preference)
    return preference


def read_response(line: Row) -> Preference:
    """A ``prompt`` (a text, or messages) and a ``response`` (a text, which may be empty), as the
    chosen response of a preference without another.

    Raises:
        InputError: a field is missing or of the wrong kind.
    """
    prompt = _turns(line, "prompt", "user")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise InputError("field 'prompt': it has to end with a turn that is not the assistant's.")
    response = {"role": "assistant", "content": _text(line, "response")}
    return Preference(prompt, [response], None)


@contextmanager
def naming_row(number: int) -> Iterator[None]:
    """Put the row's number in the source, from 0, in front of what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"row {number} (from 0): {error}") from error
    except Exception as error:
        error.add_note(f"while reading row {number} (from 0)")
        raise


def resolve_format(name: str | None, rows: "Dataset") -> Format:
    """The format of this name or dotted path; detected from the first rows where it is None.

    Raises:
        InputError: no such format; for detection, none or several that fit, with what they need.
    """
    if name is None:
        return _detect(rows)
    if name in FORMATS:
        return FORMATS[name]
    if "." not in name:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise InputError(
            f"data.format: unknown format {name!r}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + f"; there are {', '.join(FORMATS)}, or give the dotted path of a function."
        )
    from rotopo.data.sources import import_function  # slow to import: datasets

    return Format(name, import_function(name), {}, needs="")


def _detect(rows: "Dataset") -> Format:
    first = rows.select(range(min(_DETECTION_ROWS, len(rows)))).to_list()
    fitting = [
        candidate for candidate in FORMATS.values() if candidate.fits(rows.column_names, first)
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = "\n".join(f"  {f.name}: {f.needs}" for f in fitting or FORMATS.values())
    columns = ", ".join(rows.column_names)
    if fitting:
        raise InputError(
            f"The rows (columns {columns}) fit several formats; set data.format to one of\n{listed}"
        )
    raise InputError(
        f"The rows (columns {columns}) fit no known format. Rename the columns, or set data.format "
        f"to the dotted path of a function row -> Preference. The known formats:\n{listed}"
    )


def _check(preference: Preference) -> None:
    if not preference.prompt or preference.prompt[-1]["role"] == "assistant":
        raise InputError("field 'prompt': it has to end with a turn that is not the assistant's.")
    responses = {"chosen": preference.chosen, "rejected": preference.rejected, **preference.extra}
    for name, turns in responses.items():
        if turns is None:
            continue
        if not any(turn["content"].strip() for turn in turns):
            raise InputError(f"field {name!r}: the response is empty.")
        if any(turn["role"] != "assistant" for turn in turns):
            raise InputError(
                f"field {name!r}: the response holds turns that are not the assistant's; only "
                "its last turns may differ between chosen and rejected."
            )
    if preference.chosen is None or preference.rejected is None:
        return
    if _stripped(preference.chosen) == _stripped(preference.rejected):
        raise InputError("fields 'chosen' and 'rejected' are equal: there is no preference.")


def _stripped(turns: list[Message]) -> list[str]:
    return [turn["content"].strip() for turn in turns]


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


_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "observation": "tool",
    "function_call": "assistant",
}


def _from_sharegpt(turn: Any, field: str) -> Message:
    if not _is_sharegpt_turn(turn) or turn["from"] not in _SHAREGPT_ROLES:
        raise InputError(
            f"field {field!r}: a turn has to be {{'from': ..., 'value': text}} with from one of "
            f"{', '.join(_SHAREGPT_ROLES)}."
        )
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _required(row: Row, field: str) -> Any:
    value = row.get(field)
    if value is None:
        raise InputError(f"field {field!r} is missing.")
    return value


def _text(row: Row, field: str) -> str:
    value = _required(row, field)
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: expected a text, found a {type(value).__name__}.")
    return value


def _messages(row: Row, field: str) -> list[Message]:
    value = _required(row, field)
    if not _are_messages(value):
        raise InputError(
            f"field {field!r}: expected a list of messages, each with a role and a content that "
            "are texts."
        )
    # Columns of structs give every message every key, None where it has none.
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _turns(row: Row, field: str, role: str) -> list[Message]:
    """Messages as they are, or a text as one turn."""
    value = _required(row, field)
    if isinstance(value, str):
        if role == "assistant" and not value.strip():
            raise InputError(f"field {field!r}: the response is empty.")
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise InputError(
            f"field {field!r}: expected a text or a list of messages, found {value!r:.40}."
        )
    return _messages(row, field)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    )


def _is_conversation(value: Any) -> bool:
    return _are_messages(value) and any(turn["role"] != "assistant" for turn in value)


def _is_prompt(value: Any) -> bool:
    return _is_text(value) or _are_messages(value)


def _is_response(value: Any) -> bool:
    return _is_prompt(value) and not _is_conversation(value)


def _is_dialogue(value: Any) -> bool:
    return _is_text(value) and "\n\nHuman:" in value and "\n\nAssistant:" in value


def _is_sharegpt_turn(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("from"), str)
        and isinstance(value.get("value"), str)
    )


def _are_sharegpt_turns(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_sharegpt_turn, value))


def _is_true_or_false(value: Any) -> bool:
    return value in (0, 1)


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float | str)


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "explicit",
            explicit,
            {"prompt": _is_prompt, "chosen": _is_response, "rejected": _is_response},
            "prompt, chosen, rejected: texts, or lists of messages with the response's turns only",
        ),
        Format(
            "implicit",
            implicit,
            {"chosen": _is_conversation, "rejected": _is_conversation},
            "chosen, rejected: whole conversations as lists of messages (and no column prompt)",
            without=("prompt",),
        ),
        Format(
            "ultrafeedback",
            ultrafeedback,
            {"prompt": _is_text, "chosen": _is_conversation, "rejected": _is_conversation},
            "prompt: text; chosen, rejected: whole conversations as lists of messages",
        ),
        Format(
            "hh",
            hh,
            {"chosen": _is_dialogue, "rejected": _is_dialogue},
            r"chosen, rejected: whole conversations as texts with '\n\nHuman:' and "
            r"'\n\nAssistant:'",
        ),
        Format(
            "align_anything",
            align_anything,
            {
                "question": _is_text,
                "response_1": _is_text,
                "response_2": _is_text,
                "overall_response": _is_label,
            },
            "question, response_1, response_2: texts; overall_response: 1 or 2",
        ),
        Format(
            "sharegpt",
            sharegpt,
            {
                "conversations": _are_sharegpt_turns,
                "chosen": _is_sharegpt_turn,
                "rejected": _is_sharegpt_turn,
            },
            "conversations: list of {from, value}; chosen, rejected: one {from, value} each",
        ),
        Format(
            "kto",
            kto,
            {"prompt": _is_prompt, "completion": _is_response, "label": _is_true_or_false},
            "prompt, completion: texts or lists of messages; label: true or false. Unpaired",
        ),
    )
}
