"""A frozen base that bitsandbytes keeps in 4 or 8 bits a weight."""

import importlib.util
from typing import Any, get_args

import peft
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rotopo.errors import InputError
from rotopo.models.settings import BackboneConfig, Quantization
from rotopo.models.sharding import Sharding
from rotopo.rotation import RotationConfig

# Whose layers multiply by the quantised weight as by the dequantised one, in both widths (tests).
# PEFT has others that compute with the packed numbers, without a word.
ADAPTERS = (
    RotationConfig,
    peft.LoraConfig,
    peft.BOFTConfig,
    peft.GraloraConfig,
    peft.HiraConfig,
    peft.IA3Config,
    peft.OFTConfig,
    peft.RandLoraConfig,
    peft.RoadConfig,
    peft.VeraConfig,
)


def quantized(
    config: BackboneConfig, dtype: torch.dtype, sharding: Sharding | None = None
) -> dict[str, Any]:
    """What ``from_pretrained`` takes beside for a quantised base; nothing for one that is not.

    Args:
        config: the model's settings.
        dtype: of all that is not quantised, and of products.
        sharding: how the model is to be divided among ranks, if it is.

    Raises:
        InputError: quantising does not go with the adapter, another setting or the strategy, or
            bitsandbytes is missing.
    """
    if config.quantize is None:
        return {}
    name = f"{config.setting}.quantize"
    known = get_args(Quantization)
    if config.quantize not in known:
        raise InputError(f"{name} is {config.quantize!r}: it has to be {' or '.join(known)}.")
    _refuse_adapter(config, name)
    if config.compile is True:
        raise InputError(
            f"{name} and {config.setting}.compile do not go together: the compiler cannot look "
            "into bitsandbytes' products. Set compile to false."
        )
    if dtype == torch.float64:
        raise InputError(
            f"{name}: bitsandbytes does not compute in float64: set {config.setting}.dtype to "
            "float32, bfloat16 or float16."
        )
    if sharding is not None and config.quantize == "8bit":
        raise InputError(
            f"{name}: 8bit weights cannot be divided among ranks, since bitsandbytes keeps each of "
            "them whole in a second place too. Take 4bit, or configs/strategies/ddp.yaml."
        )
    if sharding is not None and sharding.offload:
        raise InputError(
            f"{name}: quantised weights cannot be offloaded, since their scales do not come back "
            "to the GPU with them. Set trainer.strategy.cpu_offload to false."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{name} takes the bitsandbytes package: pip install 'rotopo[quantize]'.")
    # Where it will be: 8-bit layers cannot be moved. Lightning makes the place the default one.
    device = torch.get_default_device() if sharding is None else sharding.device
    return {
        "quantization_config": _quantization(config.quantize, dtype),
        "device_map": {"": str(device)},
    }


def _refuse_adapter(config: BackboneConfig, name: str) -> None:
    adapter: Any = config.adapter
    if adapter is None:
        raise InputError(
            f"{name}: a quantised weight cannot be trained itself: set {config.setting}.adapter, "
            "or leave quantize out."
        )
    if not isinstance(adapter, ADAPTERS):
        raise InputError(
            f"{name}: {type(adapter).__name__} cannot work on quantised layers; take "
            f"{', '.join(kind.__name__ for kind in ADAPTERS)}, or leave quantize out."
        )
    start = getattr(adapter, "init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise InputError(
            f"{name}: init_lora_weights {start!r} starts from the weight, which is packed: take "
            "true, false, gaussian or orthogonal."
        )
    if config.quantize == "8bit" and getattr(adapter, "use_dora", False):
        raise InputError(
            f"{name}: PEFT's use_dora loses the scales of 8bit weights on a processor: take 4bit."
        )


def _quantization(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # As the rest of the layer, of which FSDP1 makes one tensor; what has the dtype already, a
        # conversion to it leaves alone.
        bnb_4bit_quant_storage=dtype,
    )


def compute_as_in_training(model: nn.Module) -> None:
    """Keep bitsandbytes on processors to one way of computing.

    In evaluation it would repack 4-bit weights for good, into a form of coarser scales that has no
    backward pass; and round the inputs of 8-bit ones to 8 bits too, which it does not in training.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # Linear4bit
            module.support_avx512bf16_for_cpu = False
        elif type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_in_training)


def _in_training(module: Any, arguments: tuple[Tensor]) -> None:
    if arguments[0].device.type == "cpu":
        module.training = True
