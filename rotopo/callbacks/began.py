"""Whether a run has begun to compute."""

from typing import Any

from lightning.pytorch import Callback


class Began(Callback):
    """Knows whether a batch has been computed: what is raised from then on is no setting's."""

    def __init__(self) -> None:
        self.began = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = True

    def on_validation_batch_start(self, *_: Any) -> None:
        self.began = True

    def on_test_batch_start(self, *_: Any) -> None:
        self.began = True

    def on_predict_batch_start(self, *_: Any) -> None:
        self.began = True
