"""Tokenised rows -> tensors that say where everything is.

A row is one prompt with K ≥ 1 responses. Two layouts hold the same rows:

- ``padded``: one line per response, ``prompt | response``, padded on the right.
- ``shared_prompt``: one line per row, ``prompt | response 1 | response 2 | ...``. Every response's
  positions start after the prompt, and its tokens see the prompt and themselves only, so the
  prompt is computed once for all of its responses.

The last token of a response predicts nothing and nothing attends to it, so it is a target only
and never an input. Nothing downstream strips by token value or counts from the right: the index
tensors of :class:`PairBatch` say which hidden state predicts which token of which response.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Literal, Self

import torch
from torch import Tensor

Layout = Literal["shared_prompt", "padded"]


class Role(IntEnum):
    """What a response is to its prompt."""

    CHOSEN = 0
    REJECTED = 1
    MISMATCHED = 2  # a response to another prompt, see KTO
    REFERENCE_SAMPLE = 3  # drawn from the reference, see TYPO
    GOLD = 4  # to be imitated whatever the pair says, see TPO


@dataclass(frozen=True)
class TokenizedRow:
    """One prompt and its responses as token ids; ``row`` is the index in the source data."""

    prompt: list[int]
    responses: list[list[int]]
    roles: list[Role]
    row: int


class _Transferable:
    """Moves every tensor field of a dataclass, as Lightning and DataLoader ask for it."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._apply(Tensor.pin_memory)

    def _apply(self, function) -> Self:
        tensors = {
            field.name: function(value)
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class PairBatch(_Transferable):
    """B rows of prompt and responses: S responses in all, N response tokens, R lines of T tokens.

    Attributes:
        input_ids: token ids [R, T].
        position_ids: position of each token in its own ``prompt | response`` sequence [R, T].
        segment_ids: 0 for the prompt, k ≥ 1 for the line's k-th response, -1 for padding [R, T].
        predictors: flat index into the R·T hidden states of the one that predicts each
            response token [N].
        targets: the response tokens' ids [N].
        owners: the response (0..S-1) that each response token belongs to [N].
        roles: :class:`Role` of each response [S].
        pairs: the row (0..B-1) of each response [S].
        lengths: tokens of each response, the end-of-turn token included [S].
        rows: index of each row in the source data [B].
        keys: :func:`response_key` of each response [S].
        layout: how the lines are laid out.
        loss_scale: what the sum of the pairs' losses is multiplied by, so that the micro-batches
            of one optimiser step add up to the mean over its pairs (contract 8 of the design).
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor
    roles: Tensor
    pairs: Tensor
    lengths: Tensor
    rows: Tensor
    keys: tuple[bytes, ...]
    layout: Layout
    loss_scale: float

    @property
    def n_pairs(self) -> int:
        """B, also where rows hold a single response."""
        return len(self.rows)

    def responses(self, role: Role) -> Tensor:
        """Index (0..S-1) of the response with this role in each row, in the rows' order [B]."""
        found = (self.roles == role).nonzero().squeeze(1)
        return found[self.pairs[found].argsort()]


@dataclass(frozen=True)
class PromptBatch(_Transferable):
    """Prompts to generate from: left-padded ids and mask [B, T], source rows [B]."""

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor


def line_shape(prompt: int, responses: Sequence[int], layout: Layout) -> tuple[int, int]:
    """(lines, tokens per line) that one row takes, from its lengths in tokens."""
    if layout == "shared_prompt":
        return 1, prompt + sum(responses) - len(responses)
    return len(responses), prompt + max(responses) - 1


def response_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Hash of a response's token ids behind its prompt's, 16 bytes."""
    tokens = array("q", [len(prompt), *prompt, *response])
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def collate(
    rows: Sequence[TokenizedRow], pad_id: int, layout: Layout, loss_scale: float
) -> PairBatch:
    """Lay rows out as a :class:`PairBatch`; every prompt and every response has ≥ 1 token."""
    lines: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments
    predictors: list[tuple[int, list[int]]] = []  # line and columns: flat once T is known
    targets: list[int] = []
    roles, pairs, lengths, keys = [], [], [], []

    for pair, row in enumerate(rows):
        start = len(row.prompt)
        for k, (response, role) in enumerate(zip(row.responses, row.roles, strict=True)):
            if k == 0 or layout == "padded":
                lines.append((list(row.prompt), list(range(start)), [0] * start))
                segment = 0
            ids, positions, segments = lines[-1]
            segment += 1
            inputs = response[:-1]
            columns = [start - 1, *range(len(ids), len(ids) + len(inputs))]
            predictors.append((len(lines) - 1, columns))
            ids += inputs
            positions += range(start, start + len(inputs))
            segments += [segment] * len(inputs)
            targets += response
            roles.append(int(role))
            pairs.append(pair)
            lengths.append(len(response))
            keys.append(response_key(row.prompt, response))

    T = max(len(ids) for ids, _, _ in lines)
    response_lengths = torch.tensor(lengths)
    return PairBatch(
        input_ids=torch.tensor([ids + [pad_id] * (T - len(ids)) for ids, _, _ in lines]),
        position_ids=torch.tensor([p + [0] * (T - len(p)) for _, p, _ in lines]),
        segment_ids=torch.tensor([s + [-1] * (T - len(s)) for _, _, s in lines]),
        predictors=torch.tensor(
            [line * T + column for line, columns in predictors for column in columns]
        ),
        targets=torch.tensor(targets),
        owners=torch.repeat_interleave(torch.arange(len(lengths)), response_lengths),
        roles=torch.tensor(roles),
        pairs=torch.tensor(pairs),
        lengths=response_lengths,
        rows=torch.tensor([row.row for row in rows]),
        keys=tuple(keys),
        layout=layout,
        loss_scale=loss_scale,
    )


def collate_prompts(prompts: Sequence[list[int]], pad_id: int, rows: Sequence[int]) -> PromptBatch:
    """Left-pad prompts, as generation needs them."""
    T = max(map(len, prompts))
    return PromptBatch(
        input_ids=torch.tensor([[pad_id] * (T - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts]),
        rows=torch.tensor(rows),
    )
