"""The largest micro-batch that fits."""

import math
from collections.abc import Callable


def most_pairs(
    peak: Callable[[int], int], limit: int, start: int, of_start: int, fixed: int, end: int
) -> int:
    """About the most pairs whose step takes at most so many bytes, and never more; 0 if one pair
    takes more.

    What a step takes is close to a straight line in its pairs, so that few loads say where it
    meets the limit; loads on either side of it, or a line that is known to meet it between two
    numbers of pairs, end the search.

    Args:
        peak: bytes of a step of so many pairs, which grow with them.
        limit: bytes.
        start: pairs to begin with.
        of_start: bytes of these.
        fixed: bytes of a step without pairs, about.
        end: pairs at most.
    """
    known = {start: of_start}
    fits, too_many = (start, end + 1) if of_start <= limit else (0, start)
    line = ((0, fixed), (start, of_start))
    while too_many - fits > 1:
        (a, of_a), (b, of_b) = line
        guess = math.floor(a + (limit - of_a) * (b - a) / (of_b - of_a)) if of_b > of_a else end
        if guess == fits and len(known) > 1:
            return fits
        n = min(max(guess, fits + 1), too_many - 1)
        known[n] = peak(n)
        if known[n] <= limit:
            fits = n
        else:
            too_many = n
        one, other, *_ = sorted(known.items(), key=lambda item: abs(item[1] - limit))
        line = min(one, other), max(one, other)
    return fits
