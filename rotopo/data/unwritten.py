"""What of a row its chat template does not write, found by writing it with other values."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rotopo.data.messages import Message, parsed, texts_in
from rotopo.data.preference import Preference, TemplateInputs
from rotopo.data.template import ChatTemplate
from rotopo.errors import InputError

# What a row means wherever it stands; of other fields only a response's have to be written.
_ALWAYS_NEEDED = ("content", "tool_calls", "function_call")


@dataclass(frozen=True)
class Unwritten:
    """A part of a row that is in none of its tokens.

    Attributes:
        field: where it stands: ``prompt``, a response, ``tools``, ``chat_template_kwargs``.
        role: of the turn that it is a part of; empty outside of turns.
        name: of the part.
        refused: whether the row says something else without it. Not so of what a prompt's turns
            hold beside their content and calls: reasoning, which some templates leave out of
            earlier turns on purpose, ids, names.
    """

    field: str
    role: str
    name: str
    refused: bool

    @property
    def label(self) -> str:
        """What it is, the same for all rows."""
        where = "the prompt" if self.field == "prompt" else "a response"
        return one_line(f"{self.name} of the {self.role} in {where}" if self.role else self.name)

    def __str__(self) -> str:
        if not self.role:
            return f"field {self.field!r}: the chat template reads no {self.name!r}"
        return one_line(
            f"field {self.field!r}: the chat template does not write the {self.role}'s {self.name}"
        )


def one_line(text: str) -> str:
    """A text whose roles and names may hold anything."""
    return " ".join(text.split())


class Observer:
    """Looks for what a template leaves out of rows.

    A part is unwritten if the template writes the same with another value in its place. That mostly
    follows from what kind of turn it stands in, between which, and whether a user speaks after it:
    so it is found out once for all that are alike in this. Of each row a part is only looked for,
    and tried again where it is not found as it stands.

    Args:
        template: the template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._known: dict[tuple[Any, ...], bool] = {}

    def unwritten(
        self, preference: Preference, prompt: str, responses: Mapping[str, str]
    ) -> list[Unwritten]:
        """What of a preference is not written.

        Args:
            preference: prompt and responses.
            prompt: what the template writes of the prompt.
            responses: what it writes behind that of each response, by the name of its role.
        """
        messages, inputs = preference.prompt, preference.inputs
        found = [
            Unwritten("chat_template_kwargs", "", name, True)
            for name in self.template.unread_arguments(inputs.kwargs)
        ]
        if inputs.tools:
            other = TemplateInputs(_changed(inputs.tools), inputs.kwargs)
            names = [n for t in inputs.tools for n in texts_in(t.get("function", t).get("name"))]
            if not self._written(("tools",), names, prompt, True, messages, other):
                found.append(Unwritten("tools", "", "tools", True))
        found += self._of_turns("prompt", messages, 0, prompt, inputs)
        for name, turns in preference.responses.items():
            whole = prompt + responses[name]
            found += self._of_turns(name, messages + turns, len(messages), whole, inputs)
        return found

    def _of_turns(
        self, field: str, messages: list[Message], first: int, text: str, inputs: TemplateInputs
    ) -> Iterator[Unwritten]:
        """Of the turns from the first on; the text is that of all."""
        in_response = field != "prompt"
        for place in range(first, len(messages)):
            turn = messages[place]
            surroundings = _surroundings(messages, place)
            reasoning, answer = _reasoning(turn)
            if reasoning and reasoning not in text:
                yield Unwritten(field, turn["role"], "reasoning in the content", in_response)
            for name, parts, changed in _variants(turn, answer):
                refused = in_response or name.partition(":")[0] in _ALWAYS_NEEDED
                others = [*messages[:place], changed, *messages[place + 1 :]]
                if others == messages:  # there is no other value
                    continue
                asked = (in_response, surroundings, name)
                if not self._written(asked, parts, text, refused, others, inputs):
                    yield Unwritten(field, turn["role"], name, refused)

    def _written(
        self,
        asked: tuple[Any, ...],
        parts: list[str],
        text: str,
        refused: bool,
        others: list[Message],
        inputs: TemplateInputs,
    ) -> bool:
        """Whether the template writes a part, whose texts these are.

        Args:
            asked: what it is a part of, and which.
            parts: texts that the part holds.
            text: what is written.
            refused: whether it counts if it is not.
            others: the messages with another value there.
            inputs: what the template is given beside them.
        """
        kwargs = json.dumps(inputs.kwargs, sort_keys=True, default=str)
        key = (*asked, kwargs, inputs.tools is None)
        known = self._known.get(key)
        if known is not None:
            seen = all(part in text or _in_json(part) in text for part in parts)
            if seen if known else not refused:
                return known
        # A prompt ends in the generation prompt.
        prompted = others[-1]["role"] != "assistant"
        try:
            written = not self.template.render(others, inputs, prompted).startswith(text)
        except InputError:  # it reads what it refuses
            written = True
        self._known.setdefault(key, written)
        return written


def _surroundings(messages: list[Message], place: int) -> tuple[Any, ...]:
    """What a template may go by when it writes a turn."""
    kinds = [(m["role"], *sorted(m)) for m in messages[max(0, place - 1) : place + 2]]
    later_user = any(m["role"] == "user" for m in messages[place + 1 :])
    last = place == len(messages) - 1
    return (*kinds, place == 0, last, later_user, messages[0]["role"])


def _variants(turn: Message, answer: str) -> Iterator[tuple[str, list[str], Message]]:
    """The parts of a turn: each part's name, its texts, and the turn with another one instead."""
    for name, value in turn.items():
        if name == "role" or (isinstance(value, str) and not value.strip()):
            continue
        if name == "content":
            yield name, [answer.strip()], turn | {name: _changed(value)}
        elif name == "tool_calls" and isinstance(value, list):
            for part in ("name", "arguments"):
                calls = [call for call in value if isinstance(call, dict)]
                functions = [call.get("function", call) for call in calls]
                functions = [f for f in functions if isinstance(f, dict)]
                texts = [text for f in functions for text in texts_in(parsed(f.get(part)))]
                if texts:
                    yield f"{name}: {part}", texts, turn | {name: _with_other_calls(value, part)}
        else:
            yield name, list(texts_in(value)), turn | {name: _changed(value)}


def _with_other_calls(calls: list[Any], part: str) -> list[Any]:
    changed = []
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            function = call["function"]
            other = _changed(parsed(function.get(part)))
            changed.append(call | {"function": function | {part: other}})
        elif isinstance(call, dict):
            changed.append(call | {part: _changed(parsed(call.get(part)))})
        else:
            changed.append(call)
    return changed


def _changed(value: Any) -> Any:
    """Another value of the same form: as long, of the same characters, with the same names."""
    if isinstance(value, str) and value.strip():
        kept = value.rstrip()
        other = "b" if kept[-1] != "b" else "c"
        return kept[:-1] + other + value[len(kept) :]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 0 if value else 1
    if isinstance(value, list) and value:
        return [_changed(inner) for inner in value]
    if isinstance(value, dict) and value:
        # What kind of thing it is, templates tell by.
        return {name: v if name == "type" else _changed(v) for name, v in value.items()}
    return "b"  # for nothing, something


def _reasoning(turn: Message) -> tuple[str, str]:
    """The reasoning in an assistant's content, if there is some, and the rest."""
    content = turn.get("content", "")
    marked = content.lstrip().startswith("<think>") or "\n</think>" in content
    if turn["role"] != "assistant" or "</think>" not in content or not marked:
        return "", content
    before, _, answer = content.rpartition("</think>")
    return before.rpartition("<think>")[2].strip(), answer


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
