"""A pair as token ids, and how it is cut to a length."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from rotopo.errors import InputError

Truncation = Literal["prompt_left", "response_right", "drop"]


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


def truncate(
    pair: TokenizedPair, max_length: int, truncation: Truncation, leading_bos: int | None
) -> tuple[TokenizedPair, Outcome]:
    """The pair within a length, and what was done to it.

    Where the prompt and the longest response together are over it:

    - ``prompt_left``: the prompt loses tokens from its left, but not a leading BOS. Only a response
      that does not fit behind one last prompt token is cut on its right.
    - ``response_right``: the prompt stays whole and all responses are cut on their right.
    - ``drop``: the row is dropped.

    A cut response has no end-of-turn token: nothing ends there.

    Args:
        pair: of any length.
        max_length: tokens of the prompt and the longest response at most.
        truncation: which of the above.
        leading_bos: the BOS that begins rows, if one does.

    Raises:
        InputError: under ``response_right``, the prompt leaves no room for a response; or nothing
            of the difference between the responses is left.
    """
    prompt, longest = pair.prompt, pair.longest
    room, outcome = longest, Outcome.WHOLE
    if len(prompt) + longest > max_length:
        if truncation == "drop":
            return pair, Outcome.TOO_LONG
        if truncation == "prompt_left":
            head = int(prompt[0] == leading_bos)
            length = min(len(prompt), max(max_length - longest, head + 1))
            prompt = prompt[:head] + prompt[len(prompt) - length + head :]
        room = max_length - len(prompt)
        if room < 1:
            raise InputError(
                f"the prompt takes {len(prompt)} tokens, which leaves no room for a response "
                f"in data.max_length ({max_length}): raise it, or set data.truncation to "
                "'prompt_left' or 'drop'."
            )
        outcome = Outcome.RESPONSE_CUT if room < longest else Outcome.PROMPT_CUT
    extra = {role: ids[:room] for role, ids in pair.extra.items()}
    cut = TokenizedPair(prompt, pair.chosen[:room], pair.rejected[:room], extra)
    if cut.chosen == cut.rejected:
        raise InputError(
            "chosen and rejected are the same tokens within data.max_length "
            f"({max_length}): there is no preference left."
        )
    return cut, outcome
