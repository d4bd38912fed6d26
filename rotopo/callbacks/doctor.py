"""The data doctor's checks at the beginning of a fit."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rotopo.data.doctor.diagnosis import refusal, render
from rotopo.data.doctor.examination import Finding
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.files import to_json, write_whole
from rotopo.run.folder import folder_of
from rotopo.run.lightning import data_if_any, is_trial


class DataDoctor(Callback):
    """Begins every fit with the checks of ``rotopo doctor``, unless ``data.doctor`` is false.

    It runs before the model is loaded, and writes what it finds to ``doctor.json`` in the run's
    folder.

    Raises:
        InputError: there is an error in the data; on all ranks.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        data = data_if_any(trainer)
        if stage != "fit" or not isinstance(data, PairwiseDataModule) or not data.doctor:
            return
        found: list[Finding] | InputError | None = None
        if trainer.is_global_zero:
            try:
                found = data.findings(pl_module.needs)
            except InputError as error:
                found = error
        found = trainer.strategy.broadcast(found)
        if isinstance(found, InputError):
            raise found
        assert found is not None
        folder = folder_of(trainer)  # asked on every rank
        if trainer.is_global_zero and trainer.loggers and not is_trial(trainer):
            write_whole(folder / "doctor.json", to_json([asdict(f) for f in found]))
        rank_zero_info(render(found, complete=False))
        refused = refusal(found)
        if refused is not None:
            raise InputError(refused)
