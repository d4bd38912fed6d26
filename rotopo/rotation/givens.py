"""Givens rotations on a tree or a chain of coordinate pairs, as block matrices plus a low rank.

Every rotation here is kept as its difference from the identity, Rᵀ = I + Δ, so that all-zero
angles give the identity bit for bit in any dtype and under any matmul precision mode.

Source: the forward tree is published by GOFT (ICML 2024, arXiv 2404.04316), with the same pairs and
signs; its official code is not orthogonal after the first stage, so it is no oracle. "Bidirectional
Integrated Givens" is the precursor's of RoPO (2409.14836) [2nd]; that they have 2(d−1) angles is
[derived] from its number of parameters, and which pairs they rotate, and in which order, is not
confirmed by any text we could read. So that the tree is theirs, the reverse tree, the chain, a
second factor and all closed forms are [ours].
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Delta(NamedTuple):
    """Rᵀ − I = blockdiag(blocks) + left @ right, for an orthogonal R of size D × D.

    Shapes: blocks (n, b, b) with n·b ≥ D (rows and columns beyond D are zero), left (D, r),
    right (r, D). A part that is None is zero.
    """

    blocks: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def inverse(self) -> "Delta":
        """The same for R in place of Rᵀ."""
        return Delta(
            None if self.blocks is None else self.blocks.transpose(1, 2),
            None if self.right is None else self.right.T,
            None if self.left is None else self.left.T,
        )

    def rotate(self, rows: Tensor) -> Tensor:
        """rows @ Rᵀ for rows (N, D) of the factors' dtype: what the weight of a layer needs.

        Activations, which need Rᵀx = rows @ R, take `inverse().rotate`.
        """
        out = rows
        if self.left is not None and self.right is not None:
            out = torch.addmm(rows, rows @ self.left, self.right)
        if self.blocks is not None:
            N, D = rows.shape
            n, b, _ = self.blocks.shape
            turned = torch.bmm(_split(rows, n, b), self.blocks).transpose(0, 1)
            if n * b == D:
                out = (out.view(N, n, b) + turned).view(N, D)
            else:
                out = out + turned.reshape(N, n * b)[:, :D]
        return out

    def gradient(self, rows: Tensor, grad: Tensor) -> "Delta":
        """The gradient of (grad * self.rotate(rows)).sum() with respect to each part."""
        blocks = left = right = None
        if self.left is not None and self.right is not None:
            left = rows.T @ (grad @ self.right.T)
            right = (rows @ self.left).T @ grad
        if self.blocks is not None:
            n, b, _ = self.blocks.shape
            blocks = torch.bmm(_split(rows, n, b).transpose(1, 2), _split(grad, n, b))
        return Delta(blocks, left, right)

    def after(self, first: "Delta") -> "Delta":
        """Rᵀ · R₁ᵀ − I, given `first` = R₁ᵀ − I with blocks of the same size, or none.

        With Rᵀ = I + B + L·M and R₁ᵀ = I + B₁ + L₁·M₁, the blocks are B + B₁ + B·B₁, and the low
        rank is [L, Rᵀ·L₁] · [M(I + B₁); M₁]: no change where both differences are zero.
        """
        blocks = self.blocks
        if first.blocks is not None:
            blocks = (
                first.blocks if blocks is None else blocks + first.blocks + blocks @ first.blocks
            )
        left, right = self.left, self.right
        if right is not None:
            right = Delta(first.blocks).rotate(right)
        if first.left is not None and first.right is not None:
            moved = self.inverse().rotate(first.left.T).T
            left = moved if left is None else torch.cat([left, moved], dim=1)
            right = first.right if right is None else torch.cat([right, first.right])
        return Delta(blocks, left, right)

    def shifted(self, D: int) -> "Delta":
        """The same rotation of the coordinates one further along, in a circle within each block."""
        assert self.blocks is not None
        n, b, _ = self.blocks.shape
        whole, last, beyond = torch.arange(n * b, device=self.blocks.device).split(
            [D // b * b, D % b, n * b - D]
        )
        order = torch.cat([whole.view(-1, b).roll(1, 1).flatten(), last.roll(1), beyond])
        block, place = (order // b).view(n, b), (order % b).view(n, b)
        blocks = self.blocks[block[:, :1, None], place[:, :, None], place[:, None, :]]
        if self.left is None or self.right is None:
            return Delta(blocks)
        return Delta(blocks, self.left[order[:D]], self.right[:, order[:D]])


def _split(rows: Tensor, n: int, b: int) -> Tensor:
    """(N, D) → (n, N, b), zeros beyond D; copied, which makes the batched products faster."""
    beyond = n * b - rows.shape[1]
    padded = F.pad(rows, (0, beyond)) if beyond else rows
    return padded.view(len(rows), n, b).transpose(0, 1).contiguous()


def tree(angles: Tensor) -> Delta:
    """Rᵀ − I for the tree layout, of GOFT with a reverse tree [ours].

    Stage k rotates the pairs (i, i + 2ᵏ), i ≡ 0 mod 2ᵏ⁺¹: D − 1 pairs in ⌈log2 D⌉ stages for any
    D. A pair is named by its second index j, so that angles[:, j − 1] turns (j − lowbit(j), j). The
    forward tree runs the stages upwards and turns by (xᵢ, xⱼ) → (cos θ xᵢ − sin θ xⱼ, sin θ xᵢ +
    cos θ xⱼ); the reverse tree then runs the same pairs downwards, with its own angles and the
    other way around, so that equal angles cancel.

    Stages below log2 b act inside aligned blocks of b ≈ √D indices, the later ones only on the
    first index of each block, where they form another tree of at most b. So both trees together
    are one matrix per block, and a rank-n coupling of the n blocks: no D × D matrix is built.

    Args:
        angles: (1, D − 1) for the forward tree alone, (2, D − 1) for forward and reverse, radians.
    """
    directions, pairs = angles.shape
    D = pairs + 1
    places, second, position = _tree_indices(D, angles.device)
    n, K, b = len(places) - 1, *second.shape
    theta = F.pad(angles, (0, 1)).index_select(1, places.flatten()).view(directions * (n + 1), K, b)
    matrices, firsts = _tree_matrices(theta, second, position)
    # The n blocks, then the tree of their first indices.
    forward, *reverse = matrices.view(directions, n + 1, b, b)
    whole = reverse[0].transpose(1, 2) @ forward if reverse else forward
    eye = torch.eye(b, dtype=angles.dtype, device=angles.device)
    blocks, coupling = (whole - eye).split([n, 1])
    # With E picking the firsts: reverse · (I + E · coupling · Eᵀ) · forward, block by block.
    enter, *leave = firsts.view(directions, n + 1, b)[:, :n]
    left = (leave[0] if leave else eye[:1])[..., None] * coupling[0, :n, None, :n]
    right = eye[:n, :n, None] * enter
    return Delta(blocks, left.reshape(n * b, n)[:D], right.view(n, n * b)[:, :D])


def chain(angles: Tensor) -> Delta:
    """Rᵀ − I for the chain layout [ours], as one D × D block: an ablation, made to be correct.

    The forward chain rotates (0, 1), (1, 2), …, (D−2, D−1) in this order, the reverse chain then
    the same pairs from the last to the first. Angles, signs and shapes as in `tree`.

    Closed form: with c_j, s_j of angles[:, j − 1] and c_0 = c_D = 1, the forward chain is the
    Hessenberg matrix G[i, l] = c_{i+1} · s_{l+1} ⋯ s_i · c_l for l ≤ i, G[i, i+1] = −s_{i+1}.
    """
    D = angles.shape[1] + 1
    cos, sin = F.pad(angles.cos(), (1, 1), value=1.0), F.pad(angles.sin(), (1, 0))
    below = torch.ones(D, D, dtype=torch.bool, device=angles.device).tril(-1)
    carried = torch.where(below, sin[:, :, None], 1.0).cumprod(1).tril()
    sweeps = cos[:, 1:, None] * carried * cos[:, None, :-1]
    forward, *reverse = sweeps - torch.diag_embed(sin[:, 1:], offset=1)
    whole = reverse[0].T @ forward if reverse else forward
    return Delta((whole - torch.eye(D, dtype=angles.dtype, device=angles.device))[None])


def _tree_matrices(theta: Tensor, second: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The forward trees of M blocks of b = 2ᴷ indices, (M, b, b), and their first rows (M, b).

    theta (M, K, b) is the angle under which column l passes stage k, and second (K, b) whether l is
    in the second half of that stage's pair. Column l of a matrix then holds the spherical
    coordinates of a point: with φ_k = θ_k, plus π/2 where second, it leaves the product
    cos φ_0 ⋯ cos φ_{k−1} · sin φ_k in the row that stage k is the last to touch, and
    cos φ_0 ⋯ cos φ_{K−1} in row 0; position ((K + 1)·b) has the flat places of these in b × b.
    """
    M, b = len(theta), theta.shape[2]
    cos, sin = theta.cos(), theta.sin()
    stays = torch.where(second, cos, sin).unbind(1)
    climbs = torch.where(second, -sin, cos).unbind(1)
    climbed = theta.new_ones(M, b)
    entries = []
    for stay, climb in zip(stays, climbs, strict=True):
        entries.append(climbed * stay)
        climbed = climbed * climb
    entries.append(climbed)
    matrices = theta.new_zeros(M, b * b).index_copy_(1, position, torch.cat(entries, dim=1))
    return matrices.view(M, b, b), climbed


@lru_cache
def _tree_indices(D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For n blocks of b indices and the tree of their firsts: where stage k of column l finds its
    angle (n + 1, K, b), with place D − 1 for none; and `second` and `position` of a block."""
    K = ((D - 1).bit_length() + 1) // 2
    b = 1 << K
    n = -(-D // b)
    with torch.inference_mode(False):  # the cache outlives the mode, and autograd must save these
        k = torch.arange(K, device=device)[:, None]
        column = torch.arange(b, device=device)[None]
        pair = (column >> (k + 1) << (k + 1)) | (1 << k)
        starts = b * torch.arange(n, device=device)[:, None, None]
        places = torch.cat([starts + pair, b * pair[None]]).clamp(max=D) - 1
        position = torch.cat([pair, torch.zeros_like(column)]) * b + column
        return places, (column >> k & 1).bool(), position.flatten()
