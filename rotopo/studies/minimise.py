"""BFGS for losses of a few variables, which may bend, kink, flatten out or fall for ever."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["stationary", "kink", "unbounded", "unfinished"]

_ITERATIONS = 300
_TRIALS = 80  # points that one line search may look at
_FIRST_STEP = 1e-4  # short, so as not to leap over a minimum into the flat land behind it
_GAIN = 1e-22  # what a step has to promise, as a share of the loss
_LEVEL = 1e-6  # the gradient of a stationary point, also as a share of the steepest met
_STALLED = 5  # steps in a row that gain nothing
_FARTHEST = 1e6
_LOWEST = -1e9


@dataclass(frozen=True)
class Minimum:
    """A point where the descent ended.

    Attributes:
        point: the variables [K].
        value: the loss there.
        gradient: the gradient's norm.
        status: ``stationary``; ``kink``: no step descends, yet the gradient is not zero, as where
            a piecewise loss has its minimum; ``unbounded``: the loss or the point ran away;
            ``unfinished``: the iterations ran out.
    """

    point: Tensor
    value: float
    gradient: float
    status: Status


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Minimum:
    """Descend from a start by BFGS with a weak-Wolfe bisection (Lewis and Overton 2013).

    That line search, unlike the strong-Wolfe one, also gets on along kinks. Where the loss can no
    longer tell two points apart the slope decides (Hager and Zhang 2005), so that a minimum is
    found to nearly the precision of the gradient and not only of the loss.

    Args:
        loss: of the variables [K], differentiable almost everywhere.
        start: the variables at the start [K], in float64.
    """

    def at(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        value = loss(x)
        return value.item(), torch.autograd.grad(value, x)[0]

    x, (value, gradient) = start, at(start)
    steepest = gradient.norm().item()
    identity = torch.eye(len(x), dtype=x.dtype)
    inverse, untried = identity * (_FIRST_STEP / max(steepest, 1e-300)), True
    stalled = 0
    status: Status | None = None
    for _ in range(_ITERATIONS):
        step = -inverse @ gradient
        slope = float(gradient @ step)
        gain = -slope / max(1.0, abs(value))
        if gain == 0 or (gain <= _GAIN and not untried):
            break
        low, high, size = 0.0, float("inf"), 1.0
        for _ in range(_TRIALS):
            new_value, new_gradient = at(x + size * step)
            new_slope = float(new_gradient @ step)
            descends = new_value <= value + 1e-4 * size * slope
            indistinct = abs(new_value - value) <= 4e-16 * abs(value)
            if not (descends or (indistinct and new_slope <= -0.9998 * slope)):
                high = size
            elif new_slope < 0.9 * slope:
                low = size
            else:
                break
            size = 2 * low if high == float("inf") else (low + high) / 2
            if (x + size * step).abs().max() > _FARTHEST:
                x = x + low * step
                value, gradient = at(x)
                status = "unbounded"
                break
        else:
            break
        if status is not None:
            break
        stalled = stalled + 1 if new_value >= value else 0
        moved, turned = size * step, new_gradient - gradient
        x, value, gradient = x + moved, new_value, new_gradient
        steepest = max(steepest, gradient.norm().item())
        if value < _LOWEST:
            status = "unbounded"
            break
        if stalled == _STALLED:
            break
        curvature = float(moved @ turned)
        if curvature > 0 and turned @ turned > 0:  # the squares of tiny gradients are zero
            if untried:
                inverse, untried = identity * (curvature / float(turned @ turned)), False
            left = identity - torch.outer(moved, turned) / curvature
            inverse = left @ inverse @ left.T + torch.outer(moved, moved) / curvature
    else:
        status = "unfinished"
    norm = gradient.norm().item()
    if status is None:
        status = "stationary" if norm <= max(_LEVEL, _LEVEL * steepest) else "kink"
    return Minimum(x, value, norm, status)
