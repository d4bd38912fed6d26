"""GPUs by name: their memory and their peak."""

import re
from dataclasses import dataclass

import torch

from rotopo.callbacks.arithmetic import peak_flops
from rotopo.errors import InputError

# By a short name the driver's, by which the peak is known, and the memory in GiB: what data sheets
# call GB. What the driver and error correction keep of it belongs to the allowance.
CARDS = {
    "4090": ("NVIDIA GeForce RTX 4090", 24),
    "a100-40": ("NVIDIA A100-SXM4-40GB", 40),
    "a100-80": ("NVIDIA A100-SXM4-80GB", 80),
    "h100": ("NVIDIA H100 80GB HBM3", 80),
    "h200": ("NVIDIA H200", 141),
    "l40s": ("NVIDIA L40S", 48),
}


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as the user gave it.
        gib: its memory.
        driver: its name in the driver's words, if it is a known one.
    """

    name: str
    gib: float
    driver: str | None = None

    @classmethod
    def of(cls, text: str) -> "Card":
        """A card by its name, or by its memory (80GB).

        Raises:
            InputError: it is neither.
        """
        name = text.lower()
        if name in CARDS:
            driver, gib = CARDS[name]
            return cls(name, gib, driver)
        size = re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b?", name)
        if size is None or float(size[1]) == 0:
            raise InputError(
                f"--card {text}: it has to be one of {', '.join(CARDS)}, or a size as 80GB."
            )
        return cls(text, float(size[1]))

    def flops(self, dtype: torch.dtype) -> float | None:
        """FLOP/s at most in dense products of a dtype; None where nobody knows."""
        return None if self.driver is None else peak_flops(self.driver, dtype)
