"""RoPO's rotation as a PEFT tuner: y = s ⊙ (W Rᵀx) + bias with R orthogonal and W frozen.

Source: RoPO, arXiv 2508.17637 (EMNLP 2025). R acts on the inputs of a linear layer and s on its
outputs. `rotopo.rotation.givens` and `.householder` say what of R is the paper's and what is ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from rotopo.errors import InputError
from rotopo.rotation.config import PEFT_TYPE, RotationConfig
from rotopo.rotation.layer import RotationLinear, is_quantised


class RotationModel(BaseTuner):
    """The tuner that PEFT builds for a `RotationConfig`: it puts a `RotationLinear` on each target.

    Raises:
        InputError: a target module is neither nn.Linear nor Conv1D, or its weight is quantised by
            something else than bitsandbytes.
    """

    prefix = "rotation_"
    tuner_layer_cls = RotationLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, RotationLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear | Conv1D) or not (
            target.weight.is_floating_point() or is_quantised(target)
        ):
            raise InputError(
                f"target_modules matches {current_key!r}, a {type(target).__name__}; a rotation "
                "needs nn.Linear or Conv1D with a floating-point weight, or bitsandbytes' linear "
                "layers. Narrow target_modules."
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise InputError(
                f"target_modules matches {current_key!r}, whose weight nn.MultiheadAttention reads "
                "past the layer, so that a rotation of it would do nothing. Narrow target_modules."
            )
        layer = RotationLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # The layer is where it should be; PEFT's `_replace_module` would move it to the device of
        # the weight, for an offloaded one the meta device.
        setattr(parent, target_name, layer)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT makes every call of the model in this context. The argument `adapter_names`, an
        adapter for each row of the batch, is handed to every layer, as LoRA does it."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise InputError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, RotationLinear)]
        unknown = set(names) - {"__base__"}.union(*(layer.rotation_adapter for layer in layers))
        if unknown:
            raise InputError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )
        # Beam search repeats each row of the batch, but not for the encoder of a model with one.
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        encoding = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, RotationLinear | AuxiliaryTrainingWrapper):
                    each = 1 if module in encoding else beams
                    rows = [name for name in names for _ in range(each)]
                    handles.append(
                        module.register_forward_pre_hook(
                            partial(_hand_names, rows), with_kwargs=True
                        )
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hand_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = RotationConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = RotationModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = RotationModel.prefix
