"""Tokenised rows -> tensors that say where everything is.

A row is one prompt with K ≥ 1 responses. Three layouts hold the same rows:

- ``padded``: one line per response, ``prompt | response``, padded on the right.
- ``shared_prompt``: one line per row, ``prompt | response 1 | response 2 | ...``, padded on the
  right. Every response's positions start after the prompt, and its tokens see the prompt and
  themselves only, so the prompt is computed once for all of its responses.
- ``packed``: the same, all rows behind one another on a single line without any padding. No token
  sees one of another row.

The last token of a response predicts nothing and nothing attends to it, so it is a target only
and never an input. Nothing downstream strips by token value or counts from the right: the index
tensors of :class:`PairBatch` say which hidden state predicts which token of which response.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Literal, Self

import torch
from torch import Tensor

Layout = Literal["packed", "shared_prompt", "padded"]

# A block of queries ends where filling it up would add more scores than this: about what a further
# block costs in calls, measured on a CPU [ours].
_FILL_SCORES = 8192
# Longer segments are cut, so that the keys behind a stretch are left out: half of all [ours].
_STRETCH = 512


class Role(IntEnum):
    """What a response is to its prompt."""

    CHOSEN = 0
    REJECTED = 1
    MISMATCHED = 2  # a response to another prompt, see KTO
    REFERENCE_SAMPLE = 3  # drawn from the reference, see TYPO
    GOLD = 4  # to be imitated whatever the pair says, see TPO


@dataclass(frozen=True)
class TokenizedRow:
    """One prompt and its responses as token ids.

    Attributes:
        row: the index in the source data.
        margin: what the chosen's reward has to be above the rejected's by.
    """

    prompt: list[int]
    responses: list[list[int]]
    roles: list[Role]
    row: int
    margin: float = 0.0


class _Transferable:
    """Moves every tensor field of a dataclass, as Lightning and DataLoader ask for it."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._apply(Tensor.pin_memory)

    def _apply(self, function) -> Self:
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = function(value)
            elif field.name == "blocks":
                moved[field.name] = tuple(block._apply(function) for block in value)
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class AttentionBlock(_Transferable):
    """G stretches of up to Q tokens of a prompt or of a response, with all that they may see.

    A query sees those of its stretch's keys whose position is not behind its own.

    Attributes:
        queries: flat index into the R·T tokens of the lines, -1 to fill up [G, Q].
        keys: the same for the up to K tokens of the prompt and of the response so far [G, K].
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class PairBatch(_Transferable):
    """B rows of prompt and responses: S responses in all, N response tokens, R lines of T tokens.

    Attributes:
        input_ids: token ids [R, T].
        position_ids: position of each token in its own ``prompt | response`` sequence [R, T].
        segment_ids: 0 for a prompt, k ≥ 1 for its row's k-th response, -1 for padding [R, T].
        predictors: flat index into the R·T hidden states of the one that predicts each
            response token [N].
        targets: the response tokens' ids [N].
        owners: the response (0..S-1) that each response token belongs to [N].
        roles: :class:`Role` of each response [S].
        pairs: the row (0..B-1) of each response [S].
        lengths: tokens of each response, the end-of-turn token included [S]; one more in batches
            of reward models, see :class:`rotopo.data.rows.Rows`.
        rows: index of each row in the source data [B].
        margins: what each row's chosen reward has to be above its rejected's by, float32 [B].
        keys: :func:`response_key` of each response [S].
        blocks: what sees what, without the pairs of tokens that do not; empty in the padded layout.
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
    margins: Tensor
    keys: tuple[bytes, ...]
    blocks: tuple[AttentionBlock, ...]
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
    """Prompts to generate from: left-padded ids and mask [B, T], source rows [B]; and the sampling
    temperature of each [B], where it is the prompt's and not a setting."""

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    temperatures: Tensor | None = None


class Sizes:
    """Tokens that rows take in a batch, padding included.

    Args:
        lengths: tokens of each row's prompt, and of each of its responses.
        layout: the batch's layout.
    """

    def __init__(self, lengths: Sequence[tuple[int, Sequence[int]]], layout: Layout) -> None:
        self.packed = layout == "packed"
        self.shapes = [_line_shape(prompt, responses, layout) for prompt, responses in lengths]

    def __len__(self) -> int:
        return len(self.shapes)

    def longest_first(self, rows: Iterable[int]) -> list[int]:
        return sorted(rows, key=lambda i: (self.shapes[i][1], i), reverse=True)

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of a batch of these rows."""
        if self.packed:
            return sum(self.shapes[i][1] for i in rows)
        return sum(self.shapes[i][0] for i in rows) * max(self.shapes[i][1] for i in rows)

    def cut(self, rows: Sequence[int], bound: int) -> list[list[int]]:
        """Cut rows sorted longest first into as few runs of ≤ bound tokens as possible.

        A row that is over the bound by itself is a run of its own.
        """
        parts: list[list[int]] = []
        lines = longest = total = 0
        for i in rows:
            n_lines, n_tokens = self.shapes[i]
            grown = total + n_tokens if self.packed else (lines + n_lines) * longest
            if parts and grown <= bound:
                parts[-1].append(i)
                lines, total = lines + n_lines, grown
            else:
                parts.append([i])
                lines, longest, total = n_lines, n_tokens, n_lines * n_tokens
        return parts


def _line_shape(prompt: int, responses: Sequence[int], layout: Layout) -> tuple[int, int]:
    """(lines, tokens per line) that one row takes, from its lengths in tokens."""
    if layout == "padded":
        return len(responses), prompt + max(responses) - 1
    return 1, prompt + sum(responses) - len(responses)


def response_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Hash of a response's token ids behind its prompt's, 16 bytes."""
    tokens = array("q", [len(prompt), *prompt, *response])
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def collate(
    rows: Sequence[TokenizedRow], pad_id: int, layout: Layout, loss_scale: float
) -> PairBatch:
    """Lay rows out as a :class:`PairBatch`; every prompt and every response has ≥ 1 token."""
    first = segment = 0  # where the row's prompt begins on its line, and its responses so far
    lines: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments
    predictors: list[tuple[int, list[int]]] = []  # line and columns: flat once T is known
    targets: list[int] = []
    roles, pairs, lengths, keys = [], [], [], []

    for pair, row in enumerate(rows):
        start = len(row.prompt)
        for k, (response, role) in enumerate(zip(row.responses, row.roles, strict=True)):
            if not lines or layout == "padded" or (k == 0 and layout == "shared_prompt"):
                lines.append(([], [], []))
            ids, positions, segments = lines[-1]
            if k == 0 or layout == "padded":
                first = len(ids)
                ids += row.prompt
                positions += range(start)
                segments += [0] * start
                segment = 0
            segment += 1
            inputs = response[:-1]
            columns = [first + start - 1, *range(len(ids), len(ids) + len(inputs))]
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
        margins=torch.tensor([row.margin for row in rows], dtype=torch.float32),
        keys=tuple(keys),
        blocks=() if layout == "padded" else tuple(_blocks(rows, predictors, T)),
        layout=layout,
        loss_scale=loss_scale,
    )


def _blocks(
    rows: Sequence[TokenizedRow], predictors: Sequence[tuple[int, list[int]]], T: int
) -> Iterator[AttentionBlock]:
    """Stretches of similar size together; ``predictors`` are each response's line and columns."""
    stretches: list[tuple[Sequence[int], Sequence[int]]] = []
    places = iter(predictors)
    for row in rows:
        for k in range(len(row.responses)):
            line, (last, *columns) = next(places)
            prompt = range(line * T + last + 1 - len(row.prompt), line * T + last + 1)
            own = [line * T + column for column in columns]
            for segment, seen in ([(prompt, ())] if k == 0 else []) + [(own, prompt)]:
                for start in range(0, len(segment), _STRETCH):
                    end = start + _STRETCH
                    stretches.append((segment[start:end], [*seen, *segment[:end]]))
    stretches.sort(key=lambda stretch: len(stretch[1]), reverse=True)
    run: list[tuple[Sequence[int], Sequence[int]]] = []
    needed = widest = 0
    for queries, keys in stretches:
        needed += len(queries) * len(keys)
        widest = max(widest, len(queries))
        if run and (len(run) + 1) * widest * len(run[0][1]) - needed > _FILL_SCORES:
            yield _block(run)
            run, needed, widest = [], len(queries) * len(keys), len(queries)
        run.append((queries, keys))
    yield _block(run)


def _block(stretches: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AttentionBlock:
    queries, keys = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(indices) for indices in side], batch_first=True, padding_value=-1
        )
        for side in zip(*stretches, strict=True)
    )
    return AttentionBlock(queries, keys)


def collate_prompts(prompts: Sequence[list[int]], pad_id: int, rows: Sequence[int]) -> PromptBatch:
    """Left-pad prompts, as generation needs them."""
    T = max(map(len, prompts))
    return PromptBatch(
        input_ids=torch.tensor([[pad_id] * (T - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts]),
        rows=torch.tensor(rows),
    )
