"""Whether a position in an epoch means the same in two runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotopo.data.loaders import Batching
from rotopo.data.pairs import Pairs
from rotopo.errors import InputError


def position(pairs: Pairs, batching: Batching, selection: str | None) -> dict[str, Any]:
    """What a position in the epoch means nothing without.

    Args:
        pairs: the run's.
        batching: how they become batches.
        selection: what a selector's choice of rows follows from; None without one.
    """
    settings = [source.settings for source in pairs.sources]
    margins = [one.margin for one in settings]
    mixed = len(settings) > 1 or settings[0].repetitions is not None
    return {
        "data_fingerprint": pairs.fingerprint,
        "seed": batching.seed,
        "pairs_per_step": batching.pairs_per_step,
        "length_window": batching.length_window,
        "margin": margins[0] if len(margins) == 1 else margins,
        "weights_and_repetitions": [[one.weight, one.repetitions] for one in settings]
        if mixed
        else None,
        "template_time": pairs.clock,
        "selection": selection,
    }


def check_same_order(
    before: Mapping[str, Any], here: Mapping[str, Any], changed: Sequence[str] = ()
) -> None:
    """Check that a checkpoint's training pairs come in the order of this run's.

    Args:
        before: what the checkpoint says, see ``PairwiseDataModule.state_dict``.
        here: the same of this run.
        changed: settings that differ, in words, where they are known.

    Raises:
        InputError: its training pairs or their order are not these.
    """
    time, now = before.get("template_time"), here["template_time"]
    if time != now:
        raise InputError(
            f"data.template_time: the chat template writes the time, which was {time} for "
            f"this checkpoint and is {now} here: leave the setting out."
        )
    if before["data_fingerprint"] != here["data_fingerprint"]:
        differ = [one for one in changed if one.startswith("data.")]
        advice = "check data.source, data.seed, data.noise and the settings of the tokens"
        raise InputError(
            "ckpt_path: this checkpoint was trained on other pairs (fingerprint "
            f"{before['data_fingerprint']}, here {here['data_fingerprint']}): "
            f"{'; '.join(differ) or advice}."
        )
    for name, value in here.items():
        if before.get(name) != value:
            raise InputError(
                f"ckpt_path: this checkpoint was trained with {name} {before.get(name)}, here "
                f"{value}: its position in the epoch does not fit. Resume with the same."
            )
