"""Pairs of Householder reflections, H(u) = I − 2uuᵀ/‖u‖², in difference form.

RoPO's parameter count fits two vectors a module, as it fits a second Givens factor and other forms
(see `RotationConfig`); that they are these reflections is [ours]: the paper's global factor is not
confirmed by any text we could read. An even number keeps det R = +1.
"""

import torch
from torch import Tensor

from rotopo.rotation.givens import Delta


def after_reflections(delta: Delta, vectors: Tensor) -> Delta:
    """Rᵀ · H(u_m) ⋯ H(u_2) H(u_1) − I, given delta = Rᵀ − I and vectors (m, D), m even.

    Two equal reflections applied one after the other are not the identity in floating point. So
    each pair is computed as H(u2) H(u1) x = x − 2(np + q)a + 2((1−n)p − q)d with a = û1,
    d = û2 − û1, n = d·d, p = a·x, q = d·x: bit for bit the identity while u1 = u2, and equal to
    the product elsewhere. It has rank 2, and joins the low-rank part of delta.
    """
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    a, b = unit[::2], unit[1::2]
    d = b - a
    step = (d * d).sum(dim=1, keepdim=True) * a + d
    basis = torch.stack([a, d], dim=1)
    moved = -2 * torch.stack([step, step - a], dim=1)
    # Written from the left, Rᵀ meets the last pair first.
    for pair in reversed(range(len(a))):
        delta = delta.after(Delta(None, basis[pair].T, moved[pair]))
    return delta
