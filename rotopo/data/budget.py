"""How many micro-batches steps need to stay within a token budget."""

from collections.abc import Iterable, Sequence
from copy import copy

from rotopo.data.batch import Sizes


def parts_needed(sizes: Sizes, steps: Iterable[Sequence[int]], budget: int) -> int:
    """The least number of micro-batches, over all ranks, that each of some steps can be cut into.

    Args:
        sizes: of all rows.
        steps: the rows of each step.
        budget: tokens of a micro-batch at most; a row that is over it counts as one by itself.
    """
    return max((len(sizes.cut(sizes.longest_first(step), budget)) for step in steps), default=1)


def parts_in_any_order(sizes: Sizes, rows_per_step: int, budget: int, most: int = 1) -> int:
    """As :func:`parts_needed`, for every step that rows can be put into.

    Args:
        sizes: of all rows.
        rows_per_step: how many each step has.
        budget: tokens of a micro-batch at most.
        most: how often a step has the same row at most.

    No step needs more than the longest rows together: put a step's rows in the place of these,
    longest first, and each is no longer than what was there. Where rows differ in their number of
    lines (KTO's, padded) all are taken to have the most, which may be more than is needed.
    """
    longest = [
        i for i in sizes.longest_first(range(len(sizes)))[:rows_per_step] for _ in range(most)
    ]
    widest = copy(sizes)
    lines = max(n for n, _ in sizes.shapes)
    widest.shapes = [(lines, tokens) for _, tokens in sizes.shapes]
    return len(widest.cut(longest[:rows_per_step], budget))
