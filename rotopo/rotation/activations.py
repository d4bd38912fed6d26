"""The rotation applied to activations, W(Rᵀx), where the weight itself is not to be touched.

Autograd would keep every stage of a rotation, in float32 and for each token; these keep the layer's
input and output as they are, and make the stages anew in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotopo.rotation.givens import Delta


def rotated_input(x: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """Rᵀx of each token, for adapters given as merged one after the other: the last turns first.

    Args:
        x: (…, D); computed in the dtype of the deltas, and rounded to its own once at the end.
        deltas: Rᵀ − I of each adapter; those that rotate nothing may be among them.
    """
    turning = [delta for delta in reversed(deltas) if any(part is not None for part in delta)]
    if not turning:
        return x
    return _RotatedInput.apply(x, *(part for delta in turning for part in delta))


class _RotatedInput(torch.autograd.Function):
    """Flat are the parts of the deltas, in the order in which they turn x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *flat: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *flat)
        rows, deltas = _rows(x, flat)
        with torch.autocast(x.device.type, enabled=False):
            for delta in deltas:
                rows = delta.inverse().rotate(rows)
        return rows.to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        rows, deltas = _rows(x, flat)
        with torch.autocast(x.device.type, enabled=False):
            stages = [rows]
            for delta in deltas[:-1]:
                stages.append(delta.inverse().rotate(stages[-1]))
            grad = grad_out.reshape(rows.shape).to(rows.dtype)
            grads: list[Tensor | None] = []
            for delta, rows in zip(reversed(deltas), reversed(stages), strict=True):
                grads = [*delta.inverse().gradient(rows, grad).inverse(), *grads]
                if ctx.needs_input_grad[0] or delta is not deltas[0]:
                    grad = delta.rotate(grad)
        return grad.to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None, *grads


def _rows(x: Tensor, flat: Sequence[Tensor | None]) -> tuple[Tensor, list[Delta]]:
    """x as (N, D) in the dtype of the deltas, and these."""
    size = len(Delta._fields)
    deltas = [Delta(*flat[i : i + size]) for i in range(0, len(flat), size)]
    dtype = next(part.dtype for part in flat if part is not None)
    return x.reshape(-1, x.shape[-1]).to(dtype), deltas


def scaled_output(y: Tensor, bias: Tensor | None, magnitudes: Sequence[Tensor]) -> Tensor:
    """bias + s ⊙ (y − bias), as y + (s − 1)(y − bias), where the identity stays exact.

    Args:
        y: (…, out), the bias in it; rounded to its own dtype once at the end.
        bias: (out,), which is not scaled.
        magnitudes: s − 1 of each adapter (out,); together they scale by the product of all s.
    """
    if not magnitudes:
        return y
    together, *others = magnitudes
    for magnitude in others:
        together = together + magnitude + together * magnitude
    return _ScaledOutput.apply(y, bias, together)


class _ScaledOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
        ctx.save_for_backward(y, bias, magnitude)
        wide = y.to(magnitude.dtype)
        return torch.addcmul(wide, _unbiased(wide, bias), magnitude).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        y, bias, magnitude = ctx.saved_tensors
        grad = grad_out.to(magnitude.dtype)
        grad_magnitude = _total(grad * _unbiased(y.to(magnitude.dtype), bias))
        moved = grad * magnitude
        grad_bias = -_total(moved).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return (grad + moved).to(y.dtype), grad_bias, grad_magnitude


def _unbiased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y - bias


def _total(each: Tensor) -> Tensor:
    """The sum over all tokens, (…, out) → (out,)."""
    return each.flatten(0, -2).sum(0)
