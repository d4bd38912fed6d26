"""Who chooses an epoch's rows."""

from typing import Protocol

from lightning.pytorch import Trainer

from rotopo.data.rows import Rows


class Selector(Protocol):
    """Who decides before every epoch what to train on."""

    def training_rows(self, trainer: Trainer, rows: Rows) -> Rows:
        """Of all training rows those of the epoch that begins, or these with others."""

    def settings(self) -> str:
        """All that the decision follows from beside the run's own settings, as one line."""
