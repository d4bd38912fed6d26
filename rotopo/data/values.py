"""Numbers and labels of a source, which a csv file has as texts."""

import math
from typing import Any

_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def number(value: Any) -> float | None:
    """A finite number, or a text that writes one; None for anything else, a bool included."""
    if isinstance(value, str):
        # Python would also read 1_000, which no other software writes.
        try:
            value = math.nan if "_" in value else float(value)
        except ValueError:
            return None
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    return float(value)


def truth(value: Any) -> bool | None:
    """True or false, as a bool, as 1 or 0, or as a text of any of these; None for anything else."""
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None
