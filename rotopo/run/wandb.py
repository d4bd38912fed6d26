"""A fit that goes on is logged on by W&B as the run that it was."""

import pkgutil
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, WandbLogger

_IDS = "wandb"


class WandbIds(Callback):
    """Keeps in checkpoints under which ids W&B logs the fit, in the order of its loggers.

    Args:
        loggers: the run's.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = [one for one in loggers if isinstance(one, WandbLogger)]

    def state_dict(self) -> dict[str, Any]:
        return {_IDS: [one.version for one in self.loggers]} if self.loggers else {}


def settings_of(loggers: Any) -> list[Namespace]:
    """The arguments of W&B's loggers, in their order.

    Args:
        loggers: ``trainer.logger`` as it was parsed.
    """
    given = loggers if isinstance(loggers, list) else [loggers]
    return [one.init_args for one in given if isinstance(one, Namespace) and _is_wandb(one)]


def _is_wandb(settings: Namespace) -> bool:
    return issubclass(pkgutil.resolve_name(settings.class_path), WandbLogger)


def go_on(found: Sequence[Namespace], checkpoint: dict[str, Any]) -> None:
    """Have W&B go on with the runs of a checkpoint's fit; its logger lets it: ``resume="allow"``.

    Args:
        found: settings of W&B's loggers, in their order. An id that one has stays.
        checkpoint: the fit's.
    """
    states = checkpoint["callbacks"].values()
    ids: list[str] = next((state[_IDS] for state in states if _IDS in state), [])
    for settings, name in zip(found, ids, strict=False):
        if settings.get("id", name) is None and settings.get("version") is None:
            settings.id = name
