"""The noise study's language-model task: trainings by the ``rotopo`` command on real pairs.

A run trains a policy on pairs of which some are flipped (:class:`rotopo.data.noise.SymmetricFlips`)
and tests it on clean held-out pairs. The seed varies everything: which pairs are held out and which
are trained on, their order, the adapter's first weights, and the flips. From one seed all methods
start and train alike, and what is flipped at one rate is flipped at every higher one.
"""

import contextlib
import gc
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from rotopo import lightning_cli
from rotopo.endings import Ended
from rotopo.errors import InputError
from rotopo.objectives import DPO, RobustDPO
from rotopo.objectives.base import ReferenceObjective, positive
from rotopo.robust import Alternation
from rotopo.robust.flips import flip_detection
from rotopo.robust.scoring import score
from rotopo.run.continued import ContinuedRun, from_last_checkpoint
from rotopo.run.lightning import callbacks_of, data_of
from rotopo.studies.noise_methods import Method, Outcome, Round, TaskSettings

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class LanguageModel(TaskSettings):
    """Settings of the language-model task.

    Args:
        configs: files for ``rotopo fit``, in their order: model, data, optimiser. None takes
            quickstart.yaml, adapters/lora.yaml and noise.yaml of rotopo's repository:
            SmolLM2-135M-Instruct with LoRA, on critics' sentences about films.
        max_new_tokens: tokens of a drawn response at most.
        **kwargs: of :class:`~rotopo.studies.noise_methods.TaskSettings`; 4 epochs.

    Raises:
        InputError: a setting out of its range.
    """

    epochs: int = 4
    configs: list[str] | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("max_new_tokens", self.max_new_tokens)

    @property
    def files(self) -> list[Path]:
        """The files for ``rotopo fit``."""
        if self.configs is not None:
            return [Path(file) for file in self.configs]
        return [CONFIGS / name for name in ("quickstart.yaml", "adapters/lora.yaml", "noise.yaml")]


@dataclass(frozen=True)
class LanguageModelRuns:
    """The task: runs in folders of their own, of which none is done twice.

    A run's folder ``<method>-<rate>-<seed>-<hash of its settings>`` has a log, what the procedure
    did in ``rounds/``, and ``outcome.json`` once it is done. One that was interrupted goes on from
    its last checkpoint; checkpoints are deleted when it is done. Processes may share the output
    while they work on different seeds. A source of pairs is known by its name: where its content
    changes, take another output.

    Args:
        settings: of all runs.
        output: folder of their folders.
    """

    methods: ClassVar[tuple[str, ...]] = ("DPO", "cDPO", "RobustDPO", "ROPO", "ROPO+filter")
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)

    settings: LanguageModel
    output: Path

    def check(self, method: Method, flip_rate: float) -> None:
        """See that a method can be run, as far as that is known before its data is loaded.

        Raises:
            InputError: files are missing, or its objective does not suit the filter.
        """
        missing = [str(file) for file in self.settings.files if not file.is_file()]
        if missing:
            raise InputError(
                f"language_model.configs: there is no file {', '.join(missing)}: run the study in "
                "a clone of rotopo's repository, or name files of your own for rotopo fit."
            )
        method.build(flip_rate)

    def run(self, method: Method, flip_rate: float, seed: int) -> Outcome:
        """Train and test, or read what came out of it before.

        Raises:
            InputError: the command refuses its settings.
        """
        same = dpo_at_rate_0(method) if flip_rate == 0 else method
        arguments = self._arguments(same, flip_rate, seed)
        place = self.output / f"{same.name}-{flip_rate:g}-{seed}"
        this = ContinuedRun.of(place, "outcome.json", arguments, self.settings.files)
        if not this.is_done:
            began = time.perf_counter()
            found = self._trained_and_tested(arguments, this.folder, same)
            found["seconds"] = round(time.perf_counter() - began, 1)
            this.finish(found)
            for checkpoint in this.folder.rglob("*.ckpt"):
                checkpoint.unlink()
        found = this.outcome()
        return Outcome(
            found["accuracy"],
            found["detection"].get("auroc"),
            found["detection"].get("recall"),
            [Round(**round_) for round_ in found["rounds"]],
        )

    def _arguments(self, method: Method, flip_rate: float, seed: int) -> list[str]:
        """What the command is given behind its files."""
        settings = self.settings
        objective = method.objective
        held = {"beta": settings.beta} if issubclass(objective, ReferenceObjective) else {}
        model = method.settings(flip_rate, **held)
        arguments = [
            f"--model={objective.__module__}.{objective.__qualname__}",
            *(f"--model.{name}={value}" for name, value in model.items()),
            "--data.noise=rotopo.data.noise.SymmetricFlips",
            f"--data.noise.rate={flip_rate}",
            f"--data.noise.seed={seed}",
            f"--data.seed={seed}",
            f"--seed_everything={seed}",
            f"--trainer.max_epochs={settings.epochs}",
            f"--trainer.callbacks+={__name__}.TrainingMargins",
        ]
        if method.filtered:
            arguments += [
                "--trainer.callbacks+=rotopo.robust.Alternation",
                f"--trainer.callbacks.epochs_per_round={settings.epochs // settings.rounds}",
                f"--trainer.callbacks.rho={settings.rho}",
            ]
        if method.sampled:
            names = ("samples", "temperature", "max_new_tokens", "quantile")
            resampling = {name: getattr(settings, name) for name in names} | {"seed": seed}
            arguments.append(f"--trainer.callbacks.resampling={json.dumps(resampling)}")
        return arguments

    def _trained_and_tested(
        self, arguments: list[str], folder: Path, method: Method
    ) -> dict[str, Any]:
        """What is written of a run."""
        files = [f"--config={file}" for file in self.settings.files]
        place = [f"--trainer.default_root_dir={folder}", *from_last_checkpoint(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with quiet(folder / "log.txt"):
            try:
                cli = lightning_cli.run(["fit", *files, *arguments, *place])
            except Ended:
                raise
            except SystemExit as stop:  # the message is in the log, and is this error's context
                raise InputError(f"{method.name}: {stop.__context__}") from stop
            trainer: Trainer = cli.trainer
            trainer.test(cli.model, cli.datamodule, verbose=False)
        callbacks = callbacks_of(trainer)
        (margins,) = (c.margins for c in callbacks if isinstance(c, TrainingMargins))
        decisions = [d for c in callbacks if isinstance(c, Alternation) for d in c.decisions]
        flipped = cli.datamodule.pairs.flipped()
        rounds = [
            Round(
                number,
                int((~decision.kept).sum()),
                int(flipped[~decision.kept].sum()),
                len(decision.accepted),
                None,
            )
            for number, decision in enumerate(decisions, 1)
        ]
        found = {
            "accuracy": float(trainer.callback_metrics["test/rewards/accuracy"]),
            "pairs": len(flipped),
            "flipped": int(flipped.sum()),
            "detection": flip_detection(margins, flipped, self.settings.rho),
            "rounds": [asdict(round_) for round_ in rounds],
        }
        del cli, trainer, callbacks
        gc.collect()  # a model is in cycles, and the next one comes at once
        return found


def dpo_at_rate_0(method: Method) -> Method:
    """DPO in the place of cDPO and RobustDPO, which are the same loss where the flip rate that they
    are given is 0; any other method is itself."""
    if method.objective is not RobustDPO and not method.is_cdpo:
        return method
    return replace(method, name=f"DPO{method.procedure}", objective=DPO)


class TrainingMargins(Callback):
    """Scores all training pairs at the end of a test: also where a training was over already when
    it was resumed.

    Attributes:
        margins: of the pairs as they are labelled [N].
    """

    margins: np.ndarray

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        self.margins = score(trainer, data.rows("train"), "Scoring training pairs").margins


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What is printed goes to the end of a file, and Lightning's advice nowhere."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with (
            log.open("a", encoding="utf-8") as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
