"""Preference -> tokens: chat template, beginning and end of a turn."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from rotopo.data import template, tokenized, unwritten
from rotopo.data.messages import Message, texts_in
from rotopo.data.preference import Preference, TemplateInputs
from rotopo.data.settings import at_least
from rotopo.data.template import ChatTemplate
from rotopo.data.tokenized import Outcome, TokenizedPair, Truncation, truncate
from rotopo.data.unwritten import Unwritten
from rotopo.errors import InputError

OnBadRow = Literal["error", "drop"]
OnUnwritten = Literal["error", "warn"]

_NO_INPUTS = TemplateInputs()
# Which decides what tokens a preference becomes.
_CODE = (__file__, template.__file__, tokenized.__file__, unwritten.__file__)


@dataclass(frozen=True)
class Written:
    """What the template writes of a preference: the prompt, and behind it each response up to the
    end of its turn, by the name of its role."""

    prompt: str
    responses: dict[str, str]


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

    Attributes:
        template: the chat template with its arguments, its clock and the system message.
        tokenizer: a copy of the given one, with the template and the pad token in effect.
        pad_id: id of the pad token.
        end_of_turn_id: id of the token that ends every response.
        stop_ids: ids that end a generation: the end of turn, and eos where it is another token.

    Args:
        tokenizer: a fast tokenizer.
        chat_template: Jinja text, the path of a file that holds it, or the name of one of the
            tokenizer's; None takes the tokenizer's.
        chat_template_kwargs: arguments of the template, where a row has no others.
        template_time: what the template takes for the present, if it asks; None takes the present.
        system_message: put before prompts that have no system turn of their own.
        pad_token: a token of the vocabulary to pad with; None takes the tokenizer's.
        max_length: tokens of the prompt and the longer response at most.
        truncation: what happens to longer rows, see
            :func:`~rotopo.data.tokenized.truncate`.

    Raises:
        InputError: no chat template or one that does not fit the job, no pad token or one that
            ends turns, or a setting out of range. Names the setting.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_time: str | None = None,
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
        at_least("max_length", max_length, 3)
        self.max_length = max_length
        self.truncation = truncation
        self.template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs, system_message)
        if template_time is not None:
            self.template.time = _time(template_time)
        self.tokenizer = self.template.tokenizer

        added = self.tokenizer.added_tokens_decoder.values()
        named = {str(token) for token in self.tokenizer.all_special_tokens}
        special = named | {t.content for t in added if t.special}
        dialogue = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "a"},
        ]
        written = self.template.render(dialogue, _NO_INPUTS, add_generation_prompt=True)

        self._find_end_of_turn(named | {t.content for t in added if t.content.strip()})
        eos_id = cast(int | None, self.tokenizer.eos_token_id)
        self.stop_ids = sorted({self.end_of_turn_id, *([] if eos_id is None else [eos_id])})
        control = {token for token in special if token in written} | {self._end_token}
        control |= {self.tokenizer.bos_token, self.tokenizer.eos_token} - {None}
        self.pad_id = self._set_pad_token(pad_token, special - control)
        self._control_tokens = _any_of(control | {self.tokenizer.pad_token})
        self._seen = unwritten.Observer(self.template)

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

    def encode_prompt(
        self, messages: list[Message], inputs: TemplateInputs = _NO_INPUTS
    ) -> list[int]:
        """Token ids of a prompt, up to where the assistant's response begins.

        Raises:
            InputError: the template refuses the messages, or the text spells a control token.
        """
        return self._prompt_ids(self._written_prompt(messages, inputs))

    def encode(self, preference: Preference) -> TokenizedPair:
        """Token ids of a prompt and its responses, of any length.

        Raises:
            InputError: as :meth:`write`.
        """
        return self.tokenize(self.write(preference))

    def write(self, preference: Preference) -> Written:
        """What the template writes of a preference: what :meth:`encode` makes tokens of. An eos
        that the encoder appends is not in it.

        Raises:
            InputError: the template refuses the conversation or does not write responses behind
                the prompt, or the text spells a control token.
        """
        messages, inputs = preference.prompt, preference.inputs
        prompt = self._written_prompt(messages, inputs)
        return Written(
            prompt,
            {
                name: self._written_response(prompt, messages, turns, inputs, name)
                for name, turns in preference.responses.items()
            },
        )

    def tokenize(self, written: Written) -> TokenizedPair:
        """Token ids of what :meth:`write` gave."""
        ids = {name: self._response_ids(text) for name, text in written.responses.items()}
        chosen, rejected = (ids.pop(name, []) for name in ("chosen", "rejected"))
        return TokenizedPair(self._prompt_ids(written.prompt), chosen, rejected, ids)

    def unwritten(self, preference: Preference, written: Written) -> list[Unwritten]:
        """What of a preference the template does not write.

        Args:
            preference: prompt and responses.
            written: what :meth:`write` gave of them.
        """
        return self._seen.unwritten(preference, written.prompt, written.responses)

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a conversation as one text, of which :meth:`write` gives the two parts; a
        response may share a token with its prompt, or be split otherwise than by itself."""
        return self._ended(self._prompt_ids(text))

    def exported_template(self, closed: bool) -> str | dict[str, str]:
        """The chat template with all that we do around it, by which ``apply_chat_template`` alone
        gives our tokens: its arguments, the system message, and a BOS that only the tokenizer adds.

        Args:
            closed: end conversations with the token at which our reward models are read: leave out
                what the template writes behind the last end of turn (ChatML's line feed), and
                write the eos of a template that ends turns with none.

        Returns:
            the template; or all of the tokenizer's by name, if it has several.
        """
        tail = (self._after_end, "" if self._template_ends_turns else self._end_token)
        return self.template.exported(
            tail if closed and any(tail) else None, bool(self._added_bos) and not self._writes_bos
        )

    def without_control_tokens(self, text: str) -> str:
        """A text without what spells a control token, as a model may write one, piece by piece."""
        while self._control_tokens.search(text):  # what is left may spell another
            text = self._control_tokens.sub("", text)
        return text

    def truncate(self, pair: TokenizedPair) -> tuple[TokenizedPair, Outcome]:
        """The pair within ``max_length``, and what was done to it.

        Raises:
            InputError: under ``response_right``, the prompt leaves no room for a response; or
                nothing of the difference between the responses is left.
        """
        return truncate(pair, self.max_length, self.truncation, self._leading_bos)

    def fingerprint(self, clock: bool = True) -> str:
        """Hash of everything that decides which tokens a preference becomes.

        Args:
            clock: the time that the template writes is a part of it.
        """
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # State that calls with other arguments leave behind; ours set neither.
        backend["padding"] = backend["truncation"] = None
        time = self.template.time.isoformat() if clock and self.template.reads_clock else None
        settings = [
            backend,
            [self.template.text, self.template.kwargs, time],
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            [self.template.system_message, self.max_length, self.truncation],
            [transformers.__version__, tokenizers.__version__],
            [Path(code).read_text("utf-8") for code in _CODE],
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _written_prompt(self, messages: list[Message], inputs: TemplateInputs) -> str:
        self._refuse_control_tokens([messages, inputs.tools, inputs.kwargs], "prompt")
        return self.template.render(messages, inputs, add_generation_prompt=True)

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        if self._added_bos and ids[:1] != self._added_bos:
            ids = self._added_bos + ids
        if not ids:
            raise InputError("field 'prompt': the chat template makes no token of it.")
        return ids

    def _response_text(self, prompt: str, messages: list[Message], inputs: TemplateInputs) -> str:
        """What the template writes behind the prompt's text."""
        whole = self.template.render(messages, inputs, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise InputError(
                "the chat template (data.chat_template) writes a prompt with a response "
                f"differently from the prompt alone, which ends in {prompt[-40:]!r}: give one "
                "that only adds the response."
            )
        return whole[len(prompt) :]

    def _written_response(
        self,
        prompt: str,
        messages: list[Message],
        response: list[Message],
        inputs: TemplateInputs,
        field: str,
    ) -> str:
        """What the template writes behind the prompt's text, up to the end of the turn."""
        self._refuse_control_tokens(response, field)
        text = self._response_text(prompt, messages + response, inputs)
        # A turn that calls may end in another way, but for the token.
        end = (self._end_token if self._template_ends_turns else self._end) + self._after_end
        if not text.endswith(end):
            raise InputError(
                f"field {field!r}: the chat template (data.chat_template) does not end this "
                f"response with {end!r}, as it ends others."
            )
        return text[: len(text) - len(self._after_end)]

    def _response_ids(self, text: str) -> list[int]:
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
        prompt = self.template.render([question], _NO_INPUTS, add_generation_prompt=True)
        reply = {"role": "assistant", "content": answer}
        text = self._response_text(prompt, [question, reply], _NO_INPUTS)
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

    def _refuse_control_tokens(self, value: Any, field: str) -> None:
        for text in texts_in(value):
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


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"data.template_time is {text!r}: write a date or a time as 2026-01-31T12:00:00."
        ) from error
