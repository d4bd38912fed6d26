"""The blocks of a batch whose responses share lines, and the way of a layer's tensors to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from rotopo.data.batch import PairBatch
from rotopo.errors import InputError

# Blocks of up to this many scores a head keep their softmax weights for the backward pass, which
# makes those of larger ones again [ours].
_KEPT_SCORES = 512 * 512
# Keys are filled up to a multiple of this, a vector of a half type: a softmax whose rows end within
# one takes half as long again on a processor.
_KEY_MULTIPLE = 32


@dataclass(frozen=True)
class Block:
    """G groups of Q queries with the K keys that they may see.

    Attributes:
        queries: flat index into the R·T tokens of the lines, -1 to fill up [G, Q].
        keys: the same for the keys [G, K].
        mask: additive [G, 1, Q, K].
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor

    @property
    def is_kept(self) -> bool:
        return self.mask.shape[2] * self.mask.shape[3] <= _KEPT_SCORES


class Sums(NamedTuple):
    """Which rows of a matrix add up to each row of another [m, d].

    Attributes:
        indices: numbers of rows [n], those that add up to one side by side, and unused ones last.
        offsets: where in ``indices`` those of each sum begin, and the unused ones [m + 1].
    """

    indices: Tensor
    offsets: Tensor

    def of(self, rows: Tensor) -> Tensor:
        return F.embedding_bag(self.indices, rows, self.offsets, mode="sum")[:-1]


class Moves(NamedTuple):
    """From the rows of a layer's tensor, a row for each token and head, to the blocks and back.

    Attributes:
        there: to rows by block, group, head and token; zero where a block is filled up.
        back: the sum over a row's places in the blocks; zero for padding.
    """

    there: Sums
    back: Sums


@dataclass(frozen=True)
class Segments:
    """The blocks of a batch of R lines of T tokens.

    Attributes:
        blocks: each of G groups.
        shape: (R, T).
    """

    blocks: list[Block]
    shape: tuple[int, int]
    _moves: dict[tuple[str, int], Moves] = field(default_factory=dict)

    def moves(self, side: str, heads: int) -> Moves:
        """Of the ``queries`` or the ``keys``; made once, since layers are alike."""
        if (side, heads) not in self._moves:
            self._moves[side, heads] = self._made(side, heads)
        return self._moves[side, heads]

    def by_block(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor]
    ) -> Iterator[tuple[Block, tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Each block with its part of tensors whose rows lie by block.

        Returns:
            views [G, heads, Q, any] of those that have a row for each query and head, and
            [G, heads, K, any] of those for keys.
        """
        of_queries = zip(*(self._parts("queries", rows) for rows in queries), strict=True)
        of_keys = zip(*(self._parts("keys", rows) for rows in keys), strict=True)
        return zip(self.blocks, of_queries, of_keys, strict=True)

    def _parts(self, side: str, rows: Tensor) -> Iterator[Tensor]:
        indices: list[Tensor] = [getattr(block, side) for block in self.blocks]
        heads = len(rows) // sum(index.numel() for index in indices)
        parts = rows.split([heads * index.numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            yield part.view(len(index), heads, index.shape[1], -1)

    def _made(self, side: str, heads: int) -> Moves:
        indices: list[Tensor] = [getattr(block, side)[:, None] for block in self.blocks]
        device = indices[0].device
        head = torch.arange(heads, device=device)[:, None]
        # The row of each place; a fill-up's is one after the last, which sorts it to the end.
        n = self.shape[0] * self.shape[1] * heads
        rows = torch.cat([torch.where(i < 0, n, i * heads + head).flatten() for i in indices])
        used = rows < n
        starts = F.pad(used.cumsum(0), (1, 0))
        there = Sums(rows[used.logical_not().sort(stable=True).indices] % n, starts)
        by_row = rows.sort(stable=True)
        edges = torch.arange(n + 1, device=device)
        return Moves(there, Sums(by_row.indices, torch.searchsorted(by_row.values, edges)))


# By the memory of the mask that stands for them, with which they go. Not by the mask itself, which
# checkpointing and compiled graphs replace by other tensors on the same memory.
_SEGMENTS: WeakKeyDictionary[torch.UntypedStorage, Segments] = WeakKeyDictionary()


def segment_mask(batch: PairBatch, dtype: torch.dtype, window: int | None) -> Tensor:
    """An empty mask [W, 1, 0, 0] for transformers to pass on, which stands for the batch's blocks.

    W says how many scores a head has in the blocks whose weights are kept, by which the compiler
    knows how much :mod:`rotopo.models.segment_attention` keeps.

    Args:
        batch: R lines of T tokens, in a layout with blocks.
        dtype: dtype of the attention scores.
        window: how far back a query sees, itself included; None for all the way.
    """
    positions = batch.position_ids.flatten()
    blocks = []
    for block in batch.blocks:
        queries, keys = block.queries, block.keys
        keys = F.pad(keys, (0, -keys.shape[1] % _KEY_MULTIPLE), value=-1)
        of_queries, of_keys = (positions[index.clamp(min=0)] for index in (queries, keys))
        distance = of_queries[:, :, None] - of_keys[:, None, :]
        hidden = (distance < 0) | (keys < 0)[:, None, :]
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        # Half of the least: with a score added it is still finite.
        mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)
        blocks.append(Block(queries, keys, mask[:, None]))
    R, T = batch.position_ids.shape
    kept = sum(block.mask.numel() for block in blocks if block.is_kept)
    # Not of a floating-point type: FSDP casts those to others on another memory.
    carrier = torch.empty(kept, 1, 0, 0, dtype=torch.bool, device=positions.device)
    _SEGMENTS[carrier.untyped_storage()] = Segments(blocks, (R, T))
    return carrier


def segments_of(carrier: Tensor) -> Segments:
    segments = _SEGMENTS.get(carrier.untyped_storage())
    if segments is None:
        raise InputError(
            "attention: the model or the strategy changes the mask on its way to 'segments'; set "
            "data.layout to 'padded'."
        )
    return segments
