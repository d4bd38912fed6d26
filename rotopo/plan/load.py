"""The pairs of a micro-batch that a plan is made for."""

from dataclasses import dataclass, replace
from typing import Self

from rotopo.data.batch import Layout, PairBatch, Role, Sizes, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.errors import InputError


@dataclass(frozen=True)
class Load:
    """Pairs of one size.

    Attributes:
        pairs: of a micro-batch of one rank.
        prompt: tokens of each prompt.
        response: tokens of each response.
        layout: how they are laid out.
    """

    pairs: int
    prompt: int
    response: int
    layout: Layout = "packed"

    def __post_init__(self) -> None:
        for name in ("pairs", "prompt", "response"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"--{name}{'' if name == 'pairs' else '-tokens'} is {getattr(self, name)}: it "
                    "has to be at least 1."
                )

    def of(self, pairs: int) -> Self:
        """As many pairs of the same size."""
        return replace(self, pairs=pairs)

    def tokens(self, needs: Needs) -> int:
        """Tokens of the micro-batch, as ``data.token_budget`` counts them."""
        lengths = [self.response + needs.ends] * len(_roles(needs))
        return Sizes([(self.prompt, lengths)], self.layout).tokens([0] * self.pairs)

    def batch(self, needs: Needs, vocabulary: int) -> PairBatch:
        """The pairs as a batch, with the further responses that an objective asks for.

        Args:
            needs: the objective's.
            vocabulary: token ids are below it; nothing else of them matters.
        """
        roles = _roles(needs)
        length = self.response + needs.ends  # a reward is read before a further token
        rows = []
        for pair in range(self.pairs):
            ids = [(token + pair) % vocabulary for token in range(max(self.prompt, length))]
            responses = [ids[:length] for _ in roles]
            rows.append(TokenizedRow(ids[: self.prompt], responses, roles, pair))
        return collate(rows, 0, self.layout, 1 / self.pairs)


def _roles(needs: Needs) -> list[Role]:
    """A row's responses: of mismatched ones come both of another row."""
    twice = (Role.MISMATCHED,)
    return [Role.CHOSEN, Role.REJECTED, *needs.roles, *(r for r in needs.roles if r in twice)]
