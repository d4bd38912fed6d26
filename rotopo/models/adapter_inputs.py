"""What the layers of an adapter keep of their inputs until the backward pass.

An adapter's weights are float32 and the base's in a half type, so PEFT's layers convert their input
first, and autograd keeps the wide copy of every layer: three of the one input of a layer's queries,
keys and values. Here it keeps the input as it came, which all its layers share, and makes the copy
anew in the backward pass: the same conversion of the same numbers, hence the same gradients bit for
bit.

A copy is known by autograd's own graph, in which one conversion leads to it from the input,
whatever the tuner. What is not such a copy is kept as before: what dropout makes of one, say; an
input of the first decoder layer, if nothing before it trains; and everything where the base is as
wide as the adapter.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rotopo.rotation.layer import RotationLinear


def keep_inputs_as_they_come(model: nn.Module) -> None:
    """Have every layer of an adapter keep its input instead of a wider copy.

    Within these layers no other hooks on saved tensors are called, such as those of activation
    checkpointing, under which there is nothing to be gained here either.

    Args:
        model: with the adapter on it.
    """
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, RotationLinear):
            _Hooks(layer)


def keep_inputs_as_autograd_does(model: nn.Module) -> None:
    """Undo :func:`keep_inputs_as_they_come` for layers to be compiled: a compiler chooses by itself
    what to keep, and would compile every layer anew, since no two have the same hooks."""
    for layer in model.modules():
        for hook in list(layer._forward_pre_hooks.values()):
            hooks = getattr(hook, "__self__", None)
            if isinstance(hooks, _Hooks):
                hooks.remove()


# A tensor and its version; and if it is an input that stands for a view of a wider copy, the dtype,
# and the view's shape, strides and offset.
_Kept = tuple[Tensor, int, torch.dtype | None, tuple[Any, ...]]


class _Hooks:
    """A layer's, around each of its calls."""

    def __init__(self, layer: nn.Module) -> None:
        self._handles = [
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after, always_call=True),
        ]
        self._saving = saved_tensors_hooks(self._pack, _unpack)
        # Only during a call: what autograd keeps refers to this object.
        self._input: Tensor | None = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0] if arguments else None
        # Called by name, or with what is no tensor, as PEFT's SHADOW does: left alone.
        if not torch.is_grad_enabled() or not isinstance(x, Tensor) or x.grad_fn is None:
            return
        if x.dtype.itemsize < 4 and x.is_contiguous():
            self._input = x
            self._saving.__enter__()

    def _after(self, *_: object) -> None:
        if self._input is not None:
            self._input = None
            self._saving.__exit__()

    def _pack(self, tensor: Tensor) -> _Kept:
        # Of all tensors of the layer only those as large as its input are looked at more closely.
        x = self._input
        if x is not None and tensor.numel() == x.numel() and _is_copy(tensor, x):
            view = (tensor.shape, tensor.stride(), tensor.storage_offset())
            return x.detach(), x._version, tensor.dtype, view
        # A result kept with the graph it came from would keep itself until a backward pass.
        kept = tensor if tensor.grad_fn is None else tensor.detach()
        return kept, tensor._version, None, ()


def _is_copy(tensor: Tensor, x: Tensor) -> bool:
    """Whether it is an input x in a wider dtype, or a view of that."""
    copy = tensor if tensor._base is None else tensor._base
    node = copy.grad_fn
    return (
        node is not None
        and copy.dtype == tensor.dtype
        and copy.dtype.itemsize > x.dtype.itemsize
        and node.name() == "ToCopyBackward0"
        and node.next_functions[0] == (x.grad_fn, x.output_nr)
        and copy.device == x.device
        and copy.is_contiguous()
    )


def _unpack(kept: _Kept) -> Tensor:
    tensor, version, dtype, view = kept
    if tensor._version != version:  # as autograd does without hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: the input of an adapter's layer, or a tensor inside it, of shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor if dtype is None else tensor.to(dtype).as_strided(*view)
