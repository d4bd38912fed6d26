"""RewardBench 2: prompts with right and wrong responses, as pairs.

Source: Malik et al. 2025, "RewardBench 2: Advancing Reward Model Evaluation" (arXiv 2506.01937);
the columns are those of its data set, ``allenai/reward-bench-2``.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

from rotopo.data.formats import PLACE
from rotopo.data.sources import load_rows
from rotopo.errors import InputError


def pairs(source: str) -> Dataset:
    """As few pairs of a right and a wrong response as hold all responses to every prompt.

    A prompt with one right and three wrong responses makes three pairs, and the right one is in
    each. The Ties have up to twenty responses of either kind.

    Args:
        source: a file of its rows, or what :func:`rotopo.data.sources.load_rows` takes, of which
            the split is ``test``.

    Returns:
        columns ``prompt``, ``chosen`` and ``rejected``, and of :data:`rotopo.data.formats.PLACE`:
        ``subset``, ``id``, ``prompt`` (which it is), ``chosen`` and ``rejected`` (the
        numbers of the two responses), ``correct`` and ``incorrect`` (how many there are).

    Raises:
        InputError: a row that is not the benchmark's, by its number.
    """
    split = "train" if Path(source).expanduser().is_file() else "test"
    found = []
    for number, row in enumerate(load_rows(source, split)):
        try:
            chosen, rejected = _responses(row)
        except InputError as error:
            raise InputError(f"{source}, row {number} (from 0): {error}") from error
        for k in range(max(len(chosen), len(rejected))):
            i, j = k % len(chosen), k % len(rejected)
            place = {"subset": row["subset"], "id": str(row["id"])}
            place["prompt"] = f"{source}, row {number}"
            place |= {"chosen": i, "rejected": j}
            place |= {"correct": len(chosen), "incorrect": len(rejected)}
            pair = {"prompt": row["prompt"], "chosen": chosen[i], "rejected": rejected[j]}
            found.append(pair | {PLACE: place})
    return Dataset.from_list(found)


def _responses(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    for name in ("id", "prompt", "chosen", "rejected", "subset"):
        if row.get(name) is None:
            raise InputError(f"there is no {name!r}, which RewardBench 2's rows have.")
    both = row["chosen"], row["rejected"]
    for name, responses in zip(("chosen", "rejected"), both, strict=True):
        texts = isinstance(responses, list) and all(isinstance(one, str) for one in responses)
        if not texts or not responses:
            raise InputError(
                f"field {name!r}: expected a list of responses, found {responses!r:.40}: "
                "RewardBench 2's rows have several."
            )
    if len(row["chosen"]) > 1 and row["subset"].lower() != "ties":
        raise InputError(
            f"field 'chosen': {len(row['chosen'])} responses, but only the Ties have several that "
            "are right."
        )
    return both
