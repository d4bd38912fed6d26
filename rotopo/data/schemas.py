"""A row of a source -> :class:`~rotopo.data.preference.Preference`: its format found, read, and
checked."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rotopo.data.dialogue import split_dialogue
from rotopo.data.formats import (
    COMMON_COLUMNS,
    FORMATS,
    Format,
    align_anything,
    explicit,
    hh,
    implicit,
    kto,
    messages,
    read_prompt,
    read_responses,
    required,
    sharegpt,
    ultrafeedback,
)
from rotopo.data.messages import (
    MEDIA,
    Message,
    is_empty,
    is_nothing,
    parsed,
    without_loss_fields,
)
from rotopo.data.preference import Preference, Row, TemplateInputs
from rotopo.errors import InputError

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset

# What a format of one's own may build on is here, too.
__all__ = [
    "FORMATS",
    "Format",
    "Message",
    "Preference",
    "Row",
    "TemplateInputs",
    "align_anything",
    "explicit",
    "hh",
    "implicit",
    "kto",
    "messages",
    "naming_row",
    "read_response",
    "read_row",
    "resolve_format",
    "sharegpt",
    "ultrafeedback",
]

_DETECTION_ROWS = 20


def read_row(
    row_format: Format,
    row: Row,
    extra_responses: Mapping[str, str] | None = None,
    split_dialogues: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Preference:
    """The preference in one row.

    Args:
        row_format: how to read it.
        row: the row.
        extra_responses: column of each further response, by the name of its role.
        split_dialogues: take a prompt's turn apart that holds a whole dialogue, see
            :func:`rotopo.data.dialogue.split_dialogue`.
        template_kwargs: arguments of the chat template that the row's own are laid over.

    Raises:
        InputError: a column is missing, a value is of the wrong kind, a response is empty, both
            responses are equal, the turns are not a prompt and assistant responses, or the row
            asks for what is not done: images and the like, weights of turns. Names the field;
            :func:`naming_row` adds the row.
    """
    ours = row_format.name in FORMATS  # a user's function knows what it leaves unread
    if ours:
        _refuse_media(row)
    preference = row_format.read(row)
    for role, column in (extra_responses or {}).items():
        (preference.extra[role],) = read_responses(row, column)
    if ours:
        preference = replace(preference, inputs=_template_inputs(row))
    if template_kwargs:
        inputs = preference.inputs
        inputs = replace(inputs, kwargs={**template_kwargs, **inputs.kwargs})
        preference = replace(preference, inputs=inputs)
    if split_dialogues:
        preference = _with_dialogue_split(preference)
    _check(preference)
    return replace(
        preference,
        prompt=without_loss_fields(preference.prompt, "prompt", response=False),
        **_each_response(
            preference, lambda turns, name: without_loss_fields(turns, name, response=True)
        ),
    )


def read_response(line: Row, split_dialogues: bool = False) -> Preference:
    """A ``prompt`` (a text, or messages) and a ``response`` (a text, which may be empty, or
    messages), as the chosen response of a preference without another.

    Args:
        line: the two, and ``tools`` and ``chat_template_kwargs`` if it has them.
        split_dialogues: as of :func:`read_row`.

    Raises:
        InputError: a field is missing or of the wrong kind.
    """
    _refuse_media(line)
    response = required(line, "response")
    if isinstance(response, str):
        turns = [{"role": "assistant", "content": response}]
    else:
        (turns,) = read_responses(line, "response")
    preference = Preference(read_prompt(line, "prompt"), turns, None, {}, _template_inputs(line))
    if split_dialogues:
        preference = _with_dialogue_split(preference)
    _check_prompt(preference)
    return preference


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

    return Format(name, import_function(name), {})


def _detect(rows: "Dataset") -> Format:
    first = rows.select(range(min(_DETECTION_ROWS, len(rows)))).to_list()
    misfits = {name: f.misfit(rows.column_names, first) for name, f in FORMATS.items()}
    fitting = [FORMATS[name] for name, why in misfits.items() if why is None]
    fitting = [f for f in fitting if not any(f.name in other.rather_than for other in fitting)]
    if len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(rows.column_names)
    if fitting:
        listed = "\n".join(f"  {f.name}: {f.needs}" for f in fitting)
        raise InputError(
            f"The rows (columns {columns}) fit several formats; set data.format to one of\n{listed}"
        )
    if {"num_correct", "num_incorrect"} <= set(rows.column_names):
        raise InputError(
            "The rows are RewardBench 2's, with several responses of a kind: name them in "
            "data.source as python:rotopo.data.reward_bench_2.pairs:FILE."
        )
    listed = "\n".join(f"  {name}: {why}" for name, why in misfits.items())
    raise InputError(
        f"The rows (columns {columns}) fit no known format. Say in data.columns which is which, or "
        "set data.format to the dotted path of a function row -> Preference. Of the known formats\n"
        f"{listed}"
    )


def _refuse_media(row: Row) -> None:
    for column in MEDIA:
        if not is_nothing(row.get(column)):
            raise InputError(
                f"field {column!r}: text is all that is trained on, and this row has more: remove "
                "the row or, if its text stands by itself, the column."
            )


def _template_inputs(row: Row) -> TemplateInputs:
    tools, kwargs = (_given(row.get(column)) for column in COMMON_COLUMNS)
    if tools is not None:
        tools = [parsed(tool) for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(map(_is_tool, tools)):
            raise InputError(
                f"field 'tools': expected a list of JSON schemas, found {tools!r:.40}."
            )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise InputError(
            f"field 'chat_template_kwargs': expected names and values, found {kwargs!r:.40}."
        )
    # A column of structs gives every row all names.
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    return TemplateInputs(tools, given)


def _given(value: Any) -> Any:
    """A column's value, perhaps as JSON text; None for none."""
    if isinstance(value, str) and value.strip().lower() in ("", "null", "none"):
        return None
    return parsed(value) or None


def _is_tool(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function", tool), dict)


def _with_dialogue_split(preference: Preference) -> Preference:
    """Responses follow a dialogue's last mark, as in HH, whose texts have a blank there."""
    prompt: list[Message] = []
    for turn in preference.prompt:
        other = turn["role"] != "assistant"
        turns = split_dialogue(turn.get("content", "")) if other else None
        prompt += turns or [turn]
    if len(prompt) == len(preference.prompt):
        return preference
    strip = lambda turns, _: [  # noqa: E731
        turn | {"content": turn["content"].strip()} if "content" in turn else turn for turn in turns
    ]
    return replace(preference, prompt=prompt, **_each_response(preference, strip))


def _each_response(
    preference: Preference, change: Callable[[list[Message], str], list[Message]]
) -> dict[str, Any]:
    """A preference's responses, each changed, by the names of its fields."""
    changed = {name: change(turns, name) for name, turns in preference.responses.items()}
    pair = {name: changed.pop(name, None) for name in ("chosen", "rejected")}
    return {**pair, "extra": changed}


def _check(preference: Preference) -> None:
    _check_prompt(preference)
    for name, turns in preference.responses.items():
        if all(map(is_empty, turns)):
            raise InputError(f"field {name!r}: the response is empty.")
        others = sorted({turn["role"] for turn in turns} - {"assistant"})
        if others:
            raise InputError(
                f"field {name!r}: the response holds turns that are not the assistant's "
                f"({', '.join(map(repr, others))}); only its last turns may differ between chosen "
                "and rejected."
            )
    if preference.chosen is None or preference.rejected is None:
        return
    if _stripped(preference.chosen) == _stripped(preference.rejected):
        raise InputError("fields 'chosen' and 'rejected' are equal: there is no preference.")


def _check_prompt(preference: Preference) -> None:
    if not preference.prompt or preference.prompt[-1]["role"] == "assistant":
        raise InputError("field 'prompt': it has to end with a turn that is not the assistant's.")


def _stripped(turns: list[Message]) -> list[Message]:
    return [turn | {"content": turn.get("content", "").strip()} for turn in turns]
