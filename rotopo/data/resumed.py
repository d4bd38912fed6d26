"""Whether a position in an epoch means the same in two runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotopo.errors import InputError


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
