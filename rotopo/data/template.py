"""The chat template, as a run uses it: which of several, its arguments, its clock."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from rotopo.data.messages import Message, with_parsed_arguments
from rotopo.data.preference import TemplateInputs
from rotopo.errors import InputError

# Templates to suggest; ChatML's tokens are in the vocabulary of many base models.
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# What transformers takes itself beside the template's arguments.
_TAKEN = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
}


class ChatTemplate:
    """A tokenizer's chat template with a run's settings.

    Attributes:
        tokenizer: a copy of the given one, whose only template this is.
        text: the template.
        name: its name among the tokenizer's, if that has several.
        time: what the template takes for the present, if it asks.

    Args:
        tokenizer: the tokenizer.
        chosen: Jinja text, the path of a file that holds it, or the name of one of the
            tokenizer's; None takes the tokenizer's, of several the one called ``default``.
        kwargs: arguments of the template in every row that has no others.
        system_message: put before prompts that have no system turn of their own.

    Raises:
        InputError: no template, or an argument that it does not read; names the setting.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chosen: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        system_message: str | None = None,
    ) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.kwargs = dict(kwargs or {})
        self.system_message = system_message
        self.time = datetime.now().replace(microsecond=0)
        self._given: Any = self.tokenizer.chat_template
        self.text, self.name = _choose(self.tokenizer, chosen)
        self.tokenizer.chat_template = self.text
        for name in self.unread_arguments(self.kwargs):
            raise InputError(
                f"data.chat_template_kwargs: the chat template reads no {name!r}: see how it is "
                "spelled there."
            )

    @property
    def reads_clock(self) -> bool:
        """Whether it asks for the time, by the one function that transformers gives it."""
        return "strftime_now" in self.text

    def unread_arguments(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Those of some arguments that the template does not read."""
        return [
            name
            for name in kwargs
            if name in _TAKEN or re.search(rf"\b{re.escape(name)}\b", self.text) is None
        ]

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether a call's arguments have to be an object, which APIs give as a text of one: most
        templates would write that as a text within the call, or stumble over it."""
        text = '{"rotopo": 1}'
        call = {"name": "rotopo", "arguments": text}
        turns: list[Message] = [
            {"role": "user", "content": "a"},
            # An id as Mistral's have to be.
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "id": "rotopo000", "function": call}],
            },
        ]
        try:
            return text not in self._write(turns, TemplateInputs(), False)
        except (jinja2.TemplateError, TypeError):
            return True

    def prepared(self, messages: list[Message]) -> list[Message]:
        """Messages as the template has to be given them: a call's arguments as an object, unless it
        writes a text as it is."""
        calls = any("tool_calls" in message for message in messages)
        return with_parsed_arguments(messages) if calls and self._takes_objects else messages

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Messages behind the run's system message, unless they have their own."""
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def render(
        self, messages: list[Message], inputs: TemplateInputs, add_generation_prompt: bool
    ) -> str:
        """What the template writes of messages, the system message in front.

        Raises:
            InputError: it refuses them.
        """
        messages = self.prepared(self.with_system(messages))
        try:
            try:
                return self._write(messages, inputs, add_generation_prompt)
            except (jinja2.UndefinedError, TypeError):
                # A template that cannot do without a content, which a call may have none of.
                if all("content" in message for message in messages):
                    raise
                filled = [{"content": "", **message} for message in messages]
                return self._write(filled, inputs, add_generation_prompt)
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template (data.chat_template) refuses the turns {roles}: {error}"
            ) from error

    def _write(
        self, messages: list[Message], inputs: TemplateInputs, add_generation_prompt: bool
    ) -> str:
        with clock_stopped(self.time if self.reads_clock else None):
            return cast(
                str,
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=inputs.tools,  # type: ignore[arg-type]
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **{**self.kwargs, **inputs.kwargs},
                ),
            )

    def exported(self, ending: tuple[str, str] | None, adds_bos: bool) -> str | dict[str, str]:
        """The template with all that we do around it, by which ``apply_chat_template`` alone gives
        our tokens: the run's arguments, where none are given, and its system message. Where the
        tokenizer has several templates, all of them, this one so.

        Args:
            ending: what to leave out at the end of a conversation, and what to write there instead.
            adds_bos: write a BOS in front, which the template leaves to the tokenizer.
        """
        text = self._wrapped(ending, adds_bos)
        if not isinstance(self._given, dict):
            return text
        return self._given | {self.name or "default": text}

    def _wrapped(self, ending: tuple[str, str] | None, adds_bos: bool) -> str:
        # In front, where they are seen everywhere below.
        defaults = "".join(
            f"{{%- if {name} is not defined -%}}{{%- set {name} = {value!r} -%}}{{%- endif -%}}"
            for name, value in self.kwargs.items()
        )
        if ending is None and not adds_bos and self.system_message is None:
            # Of all white space after a block this line feed alone is left out, and the text begins
            # on a line of its own, as it did.
            return (defaults.removesuffix("-%}") + "%}\n" if defaults else "") + self.text
        system = ""
        if self.system_message is not None:
            turn = {"role": "system", "content": self.system_message}
            system = (
                "{%- if messages[0]['role'] != 'system' -%}"
                f"{{%- set messages = [{turn!r}] + messages -%}}"
                "{%- endif -%}"
            )
        written = "{{- conversation -}}"
        if ending is not None:
            written = (
                "{%- if add_generation_prompt -%}" + written + "{%- else -%}"
                f"{{{{- conversation.removesuffix({ending[0]!r}) + {ending[1]!r} -}}}}"
                "{%- endif -%}"
            )
        # Jinja drops a line feed at a template's end, and this one's is no longer at the end.
        whole = self.text.removesuffix("\n")
        bos = "{{- bos_token -}}" if adds_bos else ""
        return (
            defaults + system + "{%- set conversation %}" + whole + "{% endset -%}" + bos + written
        )


@contextmanager
def clock_stopped(time: datetime | None) -> Iterator[None]:
    """Let chat templates take a time for the present; None leaves them the clock."""
    if time is None:
        yield
        return

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Self:
            return cast(Self, time)

    # Arguments of a template are plain values, and its one function is made where nobody reaches.
    module = vars(chat_template_utils)
    clock, module["datetime"] = module["datetime"], Stopped
    try:
        yield
    finally:
        module["datetime"] = clock


def _choose(tokenizer: Any, chosen: str | None) -> tuple[str, str | None]:
    """The template's text, and its name if it is one of several."""
    given = tokenizer.chat_template
    if isinstance(given, dict):
        name = "default" if chosen is None else chosen
        if name in given:
            return given[name], name
        if chosen is None or ("{" not in chosen and not Path(chosen).expanduser().exists()):
            raise InputError(
                f"data.chat_template: the tokenizer has several templates, and none is called "
                f"{name!r}: name one of {', '.join(sorted(given))}."
            )
    if chosen is not None:
        return _read(chosen), None
    if not given:
        raise InputError(_no_template(tokenizer))
    return given, None


def _read(chosen: str) -> str:
    if "{" in chosen:
        return chosen
    try:
        return Path(chosen).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template: {chosen!r} is neither Jinja text nor a readable UTF-8 "
            f"file: {error}"
        ) from error


def _no_template(tokenizer: PreTrainedTokenizerBase) -> str:
    has_chatml = {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys()
    return (
        "data.chat_template: the tokenizer has no chat template; give Jinja text or a file. "
        + ("Its vocabulary has ChatML's tokens: " if has_chatml else "A plain one: ")
        + (_CHATML if has_chatml else _PLAIN)
    )
