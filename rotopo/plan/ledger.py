"""What is alive in memory, by what it is for, at every moment of a step."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Bytes by part.
Parts = Counter[str]
# A phase of the step, and where in the model it is; see :func:`places`.
Moment = tuple[str, int | str]

GATHERED = "gathered weights (FSDP2)"
REDUCED = "gradients to be reduced (FSDP2)"


def places(layer: int, layers: int) -> list[int | str]:
    """What a layer's place is called in models of any number of layers: the first two are counted
    from the front, the last two from the back."""
    own: list[int | str] = [layer] if layer < 2 else []
    if layer >= layers - 2:
        own.append(layer - layers)
    return own or [f"layer {layer}"]


class Ledger(TorchDispatchMode):
    """Follows every storage from its allocation to its end, of real and of fake tensors.

    A storage is entered under the ``label`` of the time, and counts until nothing refers to it.
    Within a shard of FSDP2 the local tensors count, and storages that it empties and fills again
    count by their size at the time.

    Args:
        fake: where tensors without values come from. What is allocated empty becomes one.

    Attributes:
        now: what is alive.
        most: for each moment what was alive when it was most.
        label: what the next storages are for.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.now: Parts = Counter()
        self.most: dict[Moment, Parts] = {}
        self.label = "inputs"
        self._moments: list[Moment] = []
        self._total = self._highest = 0
        # By the storage's id: it, its bytes and its label.
        self._alive: dict[int, tuple[weakref.ref[UntypedStorage], int, str]] = {}

    def enter(self, phase: str, where: Iterable[int | str]) -> None:
        """A moment begins, which may have two names."""
        self._moments = [(phase, place) for place in where]
        # A layer's backward pass is entered again when it is computed again.
        self._highest = max(
            (self.most[m].total() for m in self._moments if m in self.most), default=-1
        )
        self._note()

    def name(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """Enter tensors, or call what is there already by another label."""
        for tensor in tensors:
            if tensor is not None:
                storage = _storage(tensor)
                self._leave(id(storage))
                self._enter(storage, label)
        self._note()

    def __torch_dispatch__(
        self, function: OpOverload, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # which has it come apart, and come here again in parts
        if function is torch.ops.aten.index.Tensor:
            args = args[0], _places_of_masks(args[1])
        empty = function is torch.ops.aten.empty.memory_format  # FSDP2's whole weights, say
        with self.fake if empty else nullcontext():
            result = function(*args, **(kwargs or {}))
        label = self.label
        if function.namespace in ("fsdp", "c10d"):
            label = REDUCED if "chunk_cat" in str(function) else GATHERED
            if "reduce_scatter" in str(function):
                label = REDUCED
            self.name((t for t in tree_iter((args, kwargs)) if self._is_at_large(t)), label)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                known = self._alive.get(id(storage))
                if known is None or known[1] != storage.nbytes():
                    self._leave(id(storage))
                    self._enter(storage, known[2] if known else label)
        self._note()
        return result

    def _is_at_large(self, value: object) -> bool:
        """Whether it is a tensor that FSDP2 has just made for a collective."""
        if not isinstance(value, Tensor):
            return False
        known = self._alive.get(id(_storage(value)))
        return known is not None and known[2] == self.label

    def _enter(self, storage: UntypedStorage, label: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._leave(key)), size, label)
        self.now[label] += size
        self._total += size

    def _leave(self, key: int) -> None:
        if key in self._alive:
            _, size, label = self._alive.pop(key)
            self.now[label] -= size
            self._total -= size

    def _note(self) -> None:
        if self._total > self._highest:
            self._highest = self._total
            for moment in self._moments:
                self.most[moment] = self.now.copy()

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Within it a storage that is resized, which no operator says, is counted anew."""
        original = UntypedStorage.resize_

        def resize_(storage: UntypedStorage, size: int) -> UntypedStorage:
            result = original(storage, size)
            if id(storage) in self._alive:
                self._leave(id(storage))
                self._enter(storage, GATHERED)
                self._note()
            return result

        UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            UntypedStorage.resize_ = original  # type: ignore[method-assign]


def _places_of_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks with values as the places that they pick: how many are picked is a shape, which what
    has no values (and makes all that it meets so) cannot tell."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _storage(tensor: Tensor) -> UntypedStorage:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()
