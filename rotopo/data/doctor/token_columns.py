"""Columns of token ids, looked through once: lengths, counts of tokens, and what equals what."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset

# Rows at a time: some MB of temporary arrays.
_BATCH = 1000


@dataclass(frozen=True)
class TokenColumn:
    """What is asked of N rows of one column of token ids.

    Attributes:
        lengths: tokens [N].
        first: the first two tokens, -1 where there is none [N, 2].
        last: the last token, -1 where there is none [N].
        largest: the largest id, -1 where there is none [N].
        counts: how often each token asked for occurs [N].
        texts: a number for each sequence of tokens, the same for the same tokens, 0 for none [N].
    """

    lengths: np.ndarray
    first: np.ndarray
    last: np.ndarray
    largest: np.ndarray
    counts: dict[int, np.ndarray]
    texts: np.ndarray


def read_column(
    pairs: "Dataset", name: str, tokens: Collection[int], numbers: dict[bytes, int]
) -> TokenColumn:
    """Look through a column.

    Args:
        pairs: the rows.
        name: the column.
        tokens: ids to count.
        numbers: the number of each sequence so far, by its hash (128 bits); new ones are added.
            Columns that share it can be compared.
    """
    n = len(pairs)
    lengths = np.zeros(n, dtype=np.int64)
    first = np.full((n, 2), -1)
    last, largest = np.full(n, -1), np.full(n, -1)
    counts = {token: np.zeros(n, dtype=np.int64) for token in tokens}
    texts = np.zeros(n, dtype=np.int64)
    numbers.setdefault(hashlib.blake2b(b"", digest_size=16).digest(), 0)
    start = 0
    for table in pairs.select_columns(name).with_format("arrow").iter(_BATCH):
        column = table[name].combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        ids = column.values.to_numpy()[offsets[0] : offsets[-1]]
        offsets -= offsets[0]
        begins, ends = offsets[:-1], offsets[1:]
        rows = slice(start, start := start + len(begins))
        lengths[rows] = ends - begins
        for k in range(2):
            there = ends - begins > k
            first[rows, k][there] = ids[begins[there] + k]
        there = ends > begins
        last[rows][there] = ids[ends[there] - 1]
        if there.any():
            largest[rows][there] = np.maximum.reduceat(ids, begins[there])
        for token, count in counts.items():
            so_far = np.concatenate([[0], np.cumsum(ids == token)])
            count[rows] = so_far[ends] - so_far[begins]
        content, size = memoryview(ids.tobytes()), ids.itemsize
        digests = (
            hashlib.blake2b(content[begin * size : end * size], digest_size=16).digest()
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        )
        texts[rows] = [numbers.setdefault(digest, len(numbers)) for digest in digests]
    return TokenColumn(lengths, first, last, largest, counts, texts)
