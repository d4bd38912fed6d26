"""What Apple's GPU (mps) lacks beside other devices. None of it has run on one."""

import torch
from torch import Tensor, nn

from rotopo.errors import InputError


def for_float64(device: torch.device) -> torch.device:
    """Where a device's values are kept in float64: on the processor for mps, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def exact(values: Tensor) -> Tensor:
    """Values in float64, see :func:`for_float64`."""
    return values.to(for_float64(values.device)).double()


def refuse_on_mps(device: torch.device, module: nn.Module, dtype: str, attention: str) -> None:
    """Refuse what mps cannot do, before anything is loaded.

    Args:
        device: that is computed on; any but mps is fine.
        module: of the run, still without its model.
        dtype, attention: the model's settings.

    Raises:
        InputError: float64, or attention that torch has no mps kernel for.
    """
    if device.type != "mps":
        return
    instead = "or compute on the processor (trainer.accelerator cpu)"
    if dtype == "float64":
        raise InputError(f"policy.dtype is float64, which Apple's mps has not: float32, {instead}.")
    if attention == "flex_attention":
        raise InputError(
            "policy.attention is 'flex_attention', which torch does not have on Apple's mps: "
            f"'segments', {instead}."
        )
    wide = [name for name, value in module.named_buffers() if value.dtype == torch.float64]
    if wide:
        raise InputError(
            f"{type(module).__name__} keeps {wide[0]} in float64, which Apple's mps has not: "
            "compute on the processor (trainer.accelerator cpu)."
        )
