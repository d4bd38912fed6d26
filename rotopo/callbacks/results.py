"""What a test or a validation has found, as lines of a name and a number."""

from collections.abc import Collection, Mapping, Sequence

from rotopo.callbacks.progress import rounded

_TITLES = {
    "loss": "loss, nats",
    "rewards/chosen": "reward of the chosen",
    "rewards/rejected": "reward of the rejected",
    "rewards/margin": "margin of the rewards",
    "rewards/accuracy": "accuracy (margin > 0)",
    "rewards/sum": "sum of both rewards",
    "logps/chosen": "log-prob per token of the chosen, nats",
    "logps/rejected": "log-prob per token of the rejected, nats",
    "displacement/chosen_up": "rise of the chosen's log-prob, nats",
    "displacement/rejected_down": "fall of the rejected's log-prob, nats",
    "router_loss": "loss of the router",
    "orthogonality/max": "orthogonality error at most",
}
_LONGEST = 60  # characters of a name, so that a line stays within 80


def results_table(
    stage: str, found: Sequence[Mapping[str, float]], aside: Collection[str] = ()
) -> str:
    """Metrics under names that say what they are, rounded.

    Args:
        stage: ``test`` or ``val``, under which they are logged.
        found: each loader's, as Lightning returns them.
        aside: names of those that are told elsewhere.
    """
    rows = [
        (title(name.removeprefix(f"{stage}/")), rounded(value))
        for metrics in found
        for name, value in metrics.items()
        if name not in aside
    ]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value:>10}" for name, value in rows)


def title(name: str) -> str:
    """A metric's name in plain words, behind that of its source or set where it is of one; a user's
    own as it is."""
    for known, words in _TITLES.items():
        if name == known or name.endswith(f"/{known}"):
            of = name.removesuffix(known).rstrip("/")
            name = f"{of}: {words}" if of else words
            break
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
