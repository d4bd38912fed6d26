"""Preference -> tokens: chat template, beginning and end of a turn, truncation, and the cache."""

import copy
import hashlib
import json
import re
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal, cast, get_args

import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from rotopo.data.schemas import Message, Preference
from rotopo.errors import InputError

Truncation = Literal["prompt_left", "response_right", "drop"]
OnBadRow = Literal["error", "drop"]

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


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a prompt and of its responses; a response that is not there has none."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    extra: dict[str, list[int]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, (self.chosen, self.rejected, *self.extra.values())))


class Outcome(IntEnum):
    """What became of a row."""

    WHOLE = 0
    PROMPT_CUT = 1
    RESPONSE_CUT = 2  # and the prompt too, where the policy cuts prompts
    TOO_LONG = 3  # dropped
    BAD = 4  # dropped


class PairEncoder:
    """Turns preferences into tokens by the tokenizer's chat template.

    The prompt is rendered with the template's generation prompt and tokenised once, so it is the
    same for both responses. A response is what the template adds to the prompt's text, tokenised
    by itself, as a model would generate it behind those very prompt tokens [ours: trainers that
    tokenise the whole text let the last prompt token depend on the response]. It ends with the
    end-of-turn token and nothing after: the first special token that the template writes behind
    the assistant's content, or the tokenizer's eos where it writes none.

    A row begins with exactly one BOS if the template writes it or the tokenizer adds it.

    Text in a row that spells a control token (bos, eos, pad, end of turn, or a special token that
    the template writes) is refused: the tokenizer would read the end of a turn in the middle of
    one. Other special tokens are the user's own and are tokenised as such.

    Truncation, where the prompt and the longer response together are over ``max_length``:

    - ``prompt_left``: the prompt loses tokens from its left, but not a leading BOS. Only a
      response that does not fit behind one last prompt token is cut on its right.
    - ``response_right``: the prompt stays whole and both responses are cut on their right.
    - ``drop``: the row is dropped.

    A cut response has no end-of-turn token: nothing ends there.

    Attributes:
        tokenizer: a copy of the given one, with the template and the pad token in effect.
        pad_id: id of the pad token.
        end_of_turn_id: id of the token that ends every response.
        stop_ids: ids that end a generation: the end of turn, and eos where it is another token.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text, or the path of a file that holds it; None takes the tokenizer's.
        system_message: put before prompts that have no system turn of their own.
        pad_token: a token of the vocabulary to pad with; None takes the tokenizer's.
        max_length: tokens of the prompt and the longer response at most.
        truncation: what happens to longer rows, see above.

    Raises:
        InputError: no chat template or one that does not fit the job, no pad token or one that
            ends turns, or a setting out of range. Names the setting.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        system_message: str | None = None,
        pad_token: str | None = None,
        max_length: int = 1024,
        truncation: Truncation = "prompt_left",
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"data.tokenizer: {type(tokenizer).__name__} is not a fast tokenizer (one with a "
                "tokenizer.json): convert it, or take the fast one."
            )
        if truncation not in get_args(Truncation):
            raise InputError(
                f"data.truncation is {truncation!r}: it has to be one of "
                f"{', '.join(get_args(Truncation))}."
            )
        if max_length < 3:
            raise InputError(f"data.max_length is {max_length}: it has to be at least 3 tokens.")
        self.tokenizer = copy.deepcopy(tokenizer)
        self.system_message = system_message
        self.max_length = max_length
        self.truncation = truncation
        if chat_template is not None:
            self.tokenizer.chat_template = _read_template(chat_template)
        if not self.tokenizer.chat_template:
            raise InputError(_no_template(self.tokenizer))

        added = self.tokenizer.added_tokens_decoder.values()
        named = {str(token) for token in self.tokenizer.all_special_tokens}
        special = named | {t.content for t in added if t.special}
        dialogue = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "a"},
        ]
        written = self._render(self._with_system(dialogue), add_generation_prompt=True)

        self._find_end_of_turn(named | {t.content for t in added if t.content.strip()})
        eos_id = cast(int | None, self.tokenizer.eos_token_id)
        self.stop_ids = sorted({self.end_of_turn_id, *([] if eos_id is None else [eos_id])})
        control = {token for token in special if token in written} | {self._end_token}
        control |= {self.tokenizer.bos_token, self.tokenizer.eos_token} - {None}
        self.pad_id = self._set_pad_token(pad_token, special - control)
        self._control_tokens = _any_of(control | {self.tokenizer.pad_token})

        bos_id = cast(int | None, self.tokenizer.bos_token_id)
        adds_bos = bos_id is not None and self.tokenizer("a")["input_ids"][:1] == [bos_id]
        self._added_bos = cast(list[int], [bos_id] if adds_bos else [])
        bos = self.tokenizer.bos_token
        self._writes_bos = bos is not None and written.startswith(cast(str, bos))
        ids = self._prompt_ids(written)
        # What the template writes at every turn, as in ChatML, begins turns and not rows.
        self._leading_bos = bos_id if ids[0] == bos_id and ids.count(bos_id) == 1 else None
        # Tokenizers of the SentencePiece kind put a blank in front of a text, which a response
        # that follows a prompt does not have.
        anchor = self._ids("\n")
        self._anchor = anchor if self._ids("\na")[len(anchor) :] != self._ids("a") else None

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt, up to where the assistant's response begins.

        Raises:
            InputError: the template refuses the messages, or the text spells a control token.
        """
        return self._prompt_ids(self._render_prompt(messages))

    def encode(self, preference: Preference) -> TokenizedPair:
        """Token ids of a prompt and its responses, of any length.

        Raises:
            InputError: the template refuses the conversation or does not write responses behind
                the prompt, or the text spells a control token.
        """
        prompt = self._render_prompt(preference.prompt)

        def ids(response: list[Message] | None, field: str) -> list[int]:
            if response is None:
                return []
            return self._response_ids(prompt, preference.prompt, response, field)

        return TokenizedPair(
            self._prompt_ids(prompt),
            ids(preference.chosen, "chosen"),
            ids(preference.rejected, "rejected"),
            {role: ids(response, role) for role, response in preference.extra.items()},
        )

    def written(self, messages: list[Message], response: list[Message]) -> str:
        """The text that the template writes of a prompt and a response, up to the end of its turn:
        what :meth:`encode` makes tokens of. An eos that the encoder appends is not in it.

        Raises:
            InputError: as :meth:`encode`.
        """
        prompt = self._render_prompt(messages)
        return prompt + self._written_response(prompt, messages, response, "response")

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a conversation as one text, which :meth:`written` gives; a response may
        share a token with its prompt, or be split otherwise than by itself."""
        return self._ended(self._prompt_ids(text))

    def exported_template(self, closed: bool) -> str:
        """The chat template with all that we do around it, by which ``apply_chat_template`` alone
        gives our tokens: the system message, and a BOS that only the tokenizer adds.

        Args:
            closed: end conversations with the token at which our reward models are read: leave out
                what the template writes behind the last end of turn (ChatML's line feed), and
                write the eos of a template that ends turns with none.
        """
        template = cast(str, self.tokenizer.get_chat_template())
        tail = (self._after_end, "" if self._template_ends_turns else self._end_token)
        closed = closed and any(tail)
        lacks_bos = bool(self._added_bos) and not self._writes_bos
        if not (closed or lacks_bos or self.system_message is not None):
            return template
        system = ""
        if self.system_message is not None:
            turn = {"role": "system", "content": self.system_message}
            system = (
                "{%- if messages[0]['role'] != 'system' -%}"
                f"{{%- set messages = [{turn!r}] + messages -%}}"
                "{%- endif -%}"
            )
        written = "{{- conversation -}}"
        if closed:
            written = (
                "{%- if add_generation_prompt -%}" + written + "{%- else -%}"
                f"{{{{- conversation.removesuffix({tail[0]!r}) + {tail[1]!r} -}}}}"
                "{%- endif -%}"
            )
        # Jinja drops a line feed at a template's end, and this one's is no longer at the end.
        whole = template.removesuffix("\n")
        bos = "{{- bos_token -}}" if lacks_bos else ""
        return system + "{%- set conversation %}" + whole + "{% endset -%}" + bos + written

    def truncate(self, pair: TokenizedPair) -> tuple[TokenizedPair, Outcome]:
        """The pair within ``max_length``, and what was done to it.

        Raises:
            InputError: under ``response_right``, the prompt leaves no room for a response; or
                nothing of the difference between the responses is left.
        """
        prompt, longest = pair.prompt, pair.longest
        room, outcome = longest, Outcome.WHOLE
        if len(prompt) + longest > self.max_length:
            if self.truncation == "drop":
                return pair, Outcome.TOO_LONG
            if self.truncation == "prompt_left":
                head = int(prompt[0] == self._leading_bos)
                length = min(len(prompt), max(self.max_length - longest, head + 1))
                prompt = prompt[:head] + prompt[len(prompt) - length + head :]
            room = self.max_length - len(prompt)
            if room < 1:
                raise InputError(
                    f"the prompt takes {len(prompt)} tokens, which leaves no room for a response "
                    f"in data.max_length ({self.max_length}): raise it, or set data.truncation to "
                    "'prompt_left' or 'drop'."
                )
            outcome = Outcome.RESPONSE_CUT if room < longest else Outcome.PROMPT_CUT
        extra = {role: ids[:room] for role, ids in pair.extra.items()}
        cut = TokenizedPair(prompt, pair.chosen[:room], pair.rejected[:room], extra)
        if cut.chosen == cut.rejected:
            raise InputError(
                "chosen and rejected are the same tokens within data.max_length "
                f"({self.max_length}): there is no preference left."
            )
        return cut, outcome

    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens a preference becomes."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # State that calls with other arguments leave behind; ours set neither.
        backend["padding"] = backend["truncation"] = None
        settings = [
            backend,
            self.tokenizer.chat_template,
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            [self.system_message, self.max_length, self.truncation],
            [transformers.__version__, tokenizers.__version__],
            Path(__file__).read_text("utf-8"),
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template (data.chat_template) refuses the turns {roles}: {error}"
            ) from error
        except ValueError as error:  # several named templates, and none is the default
            raise InputError(f"data.chat_template: {error}") from error

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def _render_prompt(self, messages: list[Message]) -> str:
        self._refuse_control_tokens(messages, "prompt")
        return self._render(self._with_system(messages), add_generation_prompt=True)

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        if self._added_bos and ids[:1] != self._added_bos:
            ids = self._added_bos + ids
        if not ids:
            raise InputError("field 'prompt': the chat template makes no token of it.")
        return ids

    def _response_text(self, prompt: str, messages: list[Message]) -> str:
        """What the template writes behind the prompt's text."""
        whole = self._render(self._with_system(messages), add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise InputError(
                "the chat template (data.chat_template) writes a prompt with a response "
                f"differently from the prompt alone, which ends in {prompt[-40:]!r}: give one "
                "that only adds the response."
            )
        return whole[len(prompt) :]

    def _written_response(
        self, prompt: str, messages: list[Message], response: list[Message], field: str
    ) -> str:
        """What the template writes behind the prompt's text, up to the end of the turn."""
        self._refuse_control_tokens(response, field)
        text = self._response_text(prompt, messages + response)
        if not text.endswith(self._end + self._after_end):
            raise InputError(
                f"field {field!r}: the chat template (data.chat_template) does not end this "
                f"response with {self._end!r}, as it ends others."
            )
        return text[: len(text) - len(self._after_end)]

    def _response_ids(
        self, prompt: str, messages: list[Message], response: list[Message], field: str
    ) -> list[int]:
        text = self._written_response(prompt, messages, response, field)
        ids = None
        if self._anchor is not None:
            anchored = self._ids("\n" + text)
            if anchored[: len(self._anchor)] == self._anchor:
                ids = anchored[len(self._anchor) :]
        if ids is None:
            ids = self._ids(text)
        return self._ended(ids)

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._template_ends_turns else [*ids, self.end_of_turn_id]

    def _find_end_of_turn(self, tokens: set[str]) -> None:
        """What the template writes behind an assistant's content, up to and after the token."""
        question, answer = {"role": "user", "content": "a"}, "rotopo"
        prompt = self._render(self._with_system([question]), add_generation_prompt=True)
        text = self._response_text(prompt, [question, {"role": "assistant", "content": answer}])
        if answer not in text:
            raise InputError("data.chat_template: it does not write the assistant's content.")
        tail = text.rpartition(answer)[2]
        found = _any_of(tokens).search(tail)
        self._template_ends_turns = found is not None
        if found is not None:
            self._end, self._after_end = tail[: found.end()], tail[found.end() :]
            self._end_token = found.group()
        elif self.tokenizer.eos_token is not None:
            self._end, self._after_end = tail, ""
            self._end_token = self.tokenizer.eos_token
        else:
            raise InputError(
                "data.chat_template: it writes no special token behind the assistant's content, "
                "and the tokenizer has no eos token: write one that ends turns."
            )
        self.end_of_turn_id = cast(int, self.tokenizer.convert_tokens_to_ids(self._end_token))

    def _refuse_control_tokens(self, messages: list[Message], field: str) -> None:
        for message in messages:
            text = message["role"] + "\n" + message["content"]
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"field {field!r}: the text holds half of a surrogate pair, which is no "
                    "character: remove it, or set data.on_bad_row to 'drop'."
                ) from error
            found = self._control_tokens.search(text)
            if found is not None:
                raise InputError(
                    f"field {field!r}: the text spells the control token {found.group()!r}, which "
                    "the tokenizer would take for the real one: remove it, or set "
                    "data.on_bad_row to 'drop'."
                )

    def _set_pad_token(self, pad_token: str | None, spare: set[str]) -> int:
        """Id of the pad token; ``spare`` are special tokens without another job, to suggest."""
        hints = ("pad", "endoftext", "end_of_text", "reserved", "unk", "")
        likely = [token for hint in hints for token in sorted(spare) if hint in token.lower()]
        suggestion = (
            f"name another one, {likely[0]!r} for example"
            if likely
            else "the vocabulary has no spare special token, so add one to the tokenizer"
        )
        if pad_token is not None:
            if pad_token not in self.tokenizer.get_vocab():
                raise InputError(
                    f"data.pad_token: {pad_token!r} is not in the vocabulary: {suggestion}."
                )
            self.tokenizer.pad_token = pad_token
        pad_id = cast(int | None, self.tokenizer.pad_token_id)
        if pad_id is None:
            raise InputError(f"data.pad_token: the tokenizer has no pad token: {suggestion}.")
        if pad_id == self.end_of_turn_id:
            raise InputError(
                f"data.pad_token: {self.tokenizer.pad_token!r} also ends every response, and "
                f"software that masks the pad token would never learn the end: {suggestion}."
            )
        return pad_id


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    # Longest first, so that a token which another begins with does not hide it.
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "$^")


def _read_template(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template: {chat_template!r} is neither Jinja text nor a readable UTF-8 "
            f"file: {error}"
        ) from error


def _no_template(tokenizer: PreTrainedTokenizerBase) -> str:
    has_chatml = {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys()
    return (
        "data.chat_template: the tokenizer has no chat template; give Jinja text or a file. "
        + ("Its vocabulary has ChatML's tokens: " if has_chatml else "A plain one: ")
        + (_CHATML if has_chatml else _PLAIN)
    )
