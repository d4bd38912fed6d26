"""Wilson's interval of a share, which the doctor of the data and the report both draw."""

import math

_NORMAL_95 = 1.959964


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927); of none (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    z2 = _NORMAL_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return centre - half, centre + half
