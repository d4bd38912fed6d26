"""R as an explicit product of D × D plane rotations and reflections, straight from the text."""

import itertools

import torch
from torch import Tensor


def givens_product(angles: Tensor, layout: str) -> Tensor:
    """G_reverse · G_forward (or G_forward alone) from angles (directions, D − 1), as (D, D)."""
    D = angles.shape[1] + 1
    if layout == "chain":
        pairs = [(i, i + 1) for i in range(D - 1)]
    else:
        pairs = []
        stage = 0
        while 2**stage < D:
            pairs += [(i, i + 2**stage) for i in range(0, D - 2**stage, 2 ** (stage + 1))]
            stage += 1
    assert len(pairs) == D - 1
    product = torch.eye(D, dtype=angles.dtype)
    # The reverse sweep turns the other way around.
    for sweep, order in zip(
        angles * torch.tensor([[1], [-1]])[: len(angles)], [pairs, pairs[::-1]], strict=False
    ):
        for i, j in order:
            rotation = torch.eye(D, dtype=angles.dtype)
            theta = sweep[j - 1]  # every index but 0 is the second of exactly one pair
            rotation[i, i] = rotation[j, j] = theta.cos()
            rotation[j, i] = theta.sin()
            rotation[i, j] = -theta.sin()
            product = rotation @ product
    return product


def shifted(R: Tensor, layout: str) -> Tensor:
    """R with coordinate i in the place of i + 1, and the last of each block in that of its first.

    A tree's blocks have 2^⌈k/2⌉ coordinates, where 2^k is the first power of two that D fits in.
    """
    D = len(R)
    size = D if layout == "chain" else 2 ** -(-(D - 1).bit_length() // 2)
    moved = torch.empty_like(R)
    places = [
        block[(i + 1) % len(block)]
        for block in torch.arange(D).split(size)
        for i in range(len(block))
    ]
    for i, j in itertools.product(range(D), repeat=2):
        moved[places[i], places[j]] = R[i, j]
    return moved


def reflections(vectors: Tensor) -> Tensor:
    """H(u_m) ⋯ H(u_1) from vectors (m, D), as (D, D)."""
    product = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for u in vectors:
        product = product - 2 * torch.outer(u, u @ product) / (u @ u)
    return product
