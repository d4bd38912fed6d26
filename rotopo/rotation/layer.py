"""The layer that stands in the place of a linear one and holds its rotations."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rotopo.errors import InputError
from rotopo.rotation.activations import rotated_input, scaled_output
from rotopo.rotation.config import RotationConfig
from rotopo.rotation.folding import fold, folded_linear
from rotopo.rotation.parameters import Rotation

PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer is bitsandbytes', whose parameter is not the weight (out, D)."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__)


class RotationLinear(nn.Module, BaseTunerLayer):
    """A frozen nn.Linear, transformers Conv1D or quantised linear layer with its rotations.

    Several active adapters act as if merged one after the other, in the order of activation. Every
    call makes the factors anew: to generate token by token, merge first, or as
    :func:`rotopo.models.merging.folded` does.

    "Linear" is in the name because PEFT finds linear layers that have adapters by it, for
    all-linear.
    """

    adapter_layer_names = ("rotation_adapter",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RotationConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rotation_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        # In a tuple, so that it is no parameter of this module as well.
        self._unmerged_weight: tuple[Tensor] | None = None
        self._active_adapter = adapter_name
        self.quantised = is_quantised(base_layer)
        if isinstance(base_layer, nn.Linear):
            self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        else:
            self.out_features, self.in_features = self._weight.shape
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RotationConfig) -> None:
        """Add an adapter, the identity at first unless the configuration says otherwise."""
        rotation = Rotation(config, self.in_features, self.out_features)
        self.rotation_adapter[adapter_name] = rotation
        hook = self._offloading
        # An offloaded weight is on the meta device between calls, where an adapter has no values.
        self._move_adapter_to_device_of_base_layer(
            adapter_name, None if hook is None else torch.device(hook.execution_device)
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def _weight(self) -> Tensor:
        """The base weight as (out, D)."""
        return self.weight.T if isinstance(self.base_layer, Conv1D) else self.weight

    @property
    def _offloading(self) -> Any:
        """Accelerate's hook that brings the base layer's weights for each call, if there is one."""
        hook = getattr(self.base_layer, "_hf_hook", None)
        return hook if getattr(hook, "offload", False) else None

    @property
    def _foldable(self) -> bool:
        """Whether W′ may be multiplied here, without a call of the base layer: where a call would
        be F.linear and no more, with no hook to run and no forward of the layer's own."""
        base = self.base_layer
        return (
            type(base).forward in PLAIN_FORWARDS
            and "forward" not in vars(base)  # where accelerate puts its hooks
            and not (base._forward_pre_hooks or base._forward_hooks)
            and not (base._backward_pre_hooks or base._backward_hooks)
        )

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """x (…, D) → (…, out).

        With more tokens than outputs the rotation is folded into the weight. Else, and where only
        a call of the base layer gives what it computes (hooks, offloading, quantised weights, a
        forward of its own), the activations are rotated: the same function.

        Args:
            x: the inputs.
            adapter_names: an adapter for each row of x, "__base__" for none, in place of the
                active ones. Rows of an adapter that this layer does not have are as of the base.

        Raises:
            InputError: adapter_names has another length than x, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.rotation_adapter]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        adapters = [self.rotation_adapter[name]() for name in active]
        if self._foldable and x.numel() // self.in_features > self.out_features:
            return folded_linear(x, self._weight, self.bias, adapters)
        rows = rotated_input(x, [factors.delta for factors in adapters])
        y = self.base_layer(rows, *args, **kwargs)
        magnitudes = [f.magnitude for f in adapters if f.magnitude is not None]
        return scaled_output(y, self._bias(y), magnitudes) if magnitudes else y

    def _bias(self, y: Tensor) -> Tensor | None:
        """The base layer's bias on y's device, where offloading has taken it away again too."""
        if self.bias is None or self.bias.is_meta == y.is_meta or self._offloading is None:
            return self.bias
        return self._offloading.weights_map["bias"].to(y.device)

    def _check_names(self, x: Tensor, adapter_names: list[str]) -> None:
        """Said in PEFT's words."""
        if len(x) != len(adapter_names):
            raise InputError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise InputError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if name in self.rotation_adapter:
                rows_of.setdefault(name, []).append(row)
        factors_of = {name: self.rotation_adapter[name]() for name in rows_of}
        rotated = x.clone()
        for name, rows in rows_of.items():
            rotated[rows] = rotated_input(x[rows], [factors_of[name].delta])
        y = self.base_layer(rotated, *args, **kwargs).clone()
        for name, rows in rows_of.items():
            magnitude = factors_of[name].magnitude
            if magnitude is not None:
                y[rows] = scaled_output(y[rows], self._bias(y), [magnitude])
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (all active ones by default) into the base layer's weight.

        The merged weight is a parameter of its own, so that a layer tied to this one keeps the
        weight that they shared; `unmerge` puts that one back. `merge_and_unload` drops it with
        this layer.

        Raises:
            InputError: the base weight is quantised, or safe_merge is set and the merged weight is
                not finite.
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.rotation_adapter
        ]
        if not names:
            return
        if self.quantised:
            raise InputError(
                f"Merging {', '.join(names)} into a quantised weight would round it once more: "
                "put the adapter on the model in full precision, and merge it there."
            )
        with torch.no_grad():
            merged = fold(self._weight, [self.rotation_adapter[name]() for name in names])
        if safe_merge and not merged.isfinite().all():
            raise InputError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                "broken"
            )
        weight: Any = self.base_layer.weight
        if self._unmerged_weight is None:
            self._unmerged_weight = (weight,)
        self.base_layer.weight = nn.Parameter(
            merged.T if isinstance(self.base_layer, Conv1D) else merged, weight.requires_grad
        )
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight from before any merge: the same parameter, bit for bit."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        (weight,) = self._unmerged_weight
        weight.data = weight.data.to(self.weight)
        self.base_layer.weight = weight
        self._unmerged_weight = None
        self.merged_adapters.clear()
