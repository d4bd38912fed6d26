"""A preference: what a row says, as chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rotopo.data.messages import Message

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TemplateInputs:
    """What a row hands to the chat template beside its messages.

    Attributes:
        tools: functions that the assistant may call, as JSON schemas; None for none.
        kwargs: arguments of the template, such as ``enable_thinking``.
    """

    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """As the columns of a row that has them."""
        columns = {"tools": self.tools, "chat_template_kwargs": self.kwargs}
        return {name: value for name, value in columns.items() if value}


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, as chat messages; or one, of unpaired data.

    Attributes:
        prompt: at least one turn, the last of them not the assistant's.
        chosen: the preferred response: one assistant turn, or several in a row. Of unpaired data
            a desirable response, or None.
        rejected: the other response. Of unpaired data an undesirable response, or None.
        extra: further responses, by the name of their role (``gold``, ``reference_sample``).
        inputs: what the chat template is given beside the messages.
    """

    prompt: list[Message]
    chosen: list[Message] | None
    rejected: list[Message] | None
    extra: dict[str, list[Message]] = field(default_factory=dict)
    inputs: TemplateInputs = TemplateInputs()

    @property
    def responses(self) -> dict[str, list[Message]]:
        """The responses that are there, by the names of their roles."""
        named = {"chosen": self.chosen, "rejected": self.rejected, **self.extra}
        return {name: turns for name, turns in named.items() if turns is not None}
