"""The rotation folded into the weight, F.linear(x, W′, bias): the fast way for many tokens, and
what merging writes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rotopo.rotation.givens import Delta


class Factors(NamedTuple):
    """What an adapter does to a weight: W′ = diag(1 + magnitude) · W · (I + Δ).

    Shapes: blocks, left, right as in `Delta`; magnitude (out,) = s − 1, or None.
    """

    blocks: Tensor | None
    left: Tensor | None
    right: Tensor | None
    magnitude: Tensor | None

    @property
    def delta(self) -> Delta:
        return Delta(self.blocks, self.left, self.right)


def fold(weight: Tensor, adapters: list[Factors]) -> Tensor:
    """weight (out, D) with the adapters applied one after the other, rounded once at the end."""
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.to(_factor_dtype(adapters))
        for factors in adapters:
            rows = _scaled(factors.delta.rotate(rows), factors)
        rows = rows.to(weight.dtype)
    # Conv1D keeps its weight transposed. The same layout gives the same product bit for bit.
    return rows if weight.is_contiguous() else rows.T.contiguous().T


def folded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[Factors]
) -> Tensor:
    """F.linear(x, fold(weight, adapters), bias) for x (…, D) and a bias (out,) or none."""
    return _FoldedLinear.apply(x, bias, weight, *(t for factors in adapters for t in factors))


def _factor_dtype(adapters: list[Factors]) -> torch.dtype:
    return next(t.dtype for factors in adapters for t in factors if t is not None)


def _scaled(rows: Tensor, factors: Factors) -> Tensor:
    return rows if factors.magnitude is None else rows * (1 + factors.magnitude)[:, None]


class _FoldedLinear(torch.autograd.Function):
    """F.linear(x, fold(weight, adapters), bias), with the folded weight made anew in the backward.

    Autograd would keep the folded weight and several float32 copies of it for every layer; here a
    layer keeps only x and the small factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, *flat: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *flat)
        return F.linear(x, fold(weight, _grouped(flat)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *flat = ctx.saved_tensors
        adapters = _grouped(flat)
        with torch.autocast(x.device.type, enabled=False):
            rows = weight.to(_factor_dtype(adapters))
            steps = []
            for factors in adapters:
                rotated = factors.delta.rotate(rows)
                steps.append((factors, rows, rotated))
                rows = _scaled(rotated, factors)
            # Under autocast x and weight can be wider than what the forward multiplied.
            folded = rows.to(weight.dtype).to(grad_y.dtype)
            grad_x = (grad_y @ folded).to(x.dtype) if ctx.needs_input_grad[0] else None
            grad_y = grad_y.reshape(-1, grad_y.shape[-1])
            grad_bias = grad_y.sum(0) if ctx.needs_input_grad[1] else None
            grad = (grad_y.T @ x.reshape(-1, x.shape[-1]).to(grad_y.dtype)).to(rows.dtype)
            grads: list[Tensor | None] = []
            for factors, rows, rotated in reversed(steps):
                magnitude = None if factors.magnitude is None else (grad * rotated).sum(1)
                grad = _scaled(grad, factors)
                grads = [*factors.delta.gradient(rows, grad), magnitude, *grads]
                if ctx.needs_input_grad[2] or factors is not adapters[0]:
                    grad = factors.delta.inverse().rotate(grad)
        grad_weight = grad.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_bias, grad_weight, *grads


def _grouped(flat: Sequence[Tensor | None]) -> list[Factors]:
    size = len(Factors._fields)
    return [Factors(*flat[i : i + size]) for i in range(0, len(flat), size)]
