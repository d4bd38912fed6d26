"""The trainings of a comparison: each a ``rotopo fit`` of its own, none done twice."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from rotopo.compare.curves import Points
from rotopo.compare.settings import Comparison
from rotopo.described import read
from rotopo.described.check import look_through
from rotopo.endings import Ended
from rotopo.errors import InputError
from rotopo.progress import Progress
from rotopo.run.continued import ContinuedRun, from_last_checkpoint


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        arm: its name.
        rate: learning rate.
        seed: of the order of the pairs and, with the arm's name, of the adapter's first weights and
            dropout. So arms are paired by the data, and no two draw the same noise.
        tuning: whether it is for choosing the rate, and so measured on the validation split.
    """

    arm: str
    rate: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.rate:g}-{self.seed}"


class Runs:
    """A comparison's runs in a folder.

    A run's folder ``ARM-RATE-SEED-<hash of its settings>`` has ``log.txt``, ``points/`` and, once
    it is done, ``done.json``. One that was interrupted goes on from its last checkpoint.

    Args:
        comparison: the settings.
        output: the folder.
    """

    def __init__(self, comparison: Comparison, output: Path) -> None:
        self.comparison = comparison
        self.output = output
        self._processes: set[subprocess.Popen[bytes]] = set()

    def check(self, runs: Sequence[Run]) -> None:
        """Refuse what is misspelt in any arm before the first run begins.

        Raises:
            InputError: names the arm and the setting.
        """
        for run in {run.arm: run for run in runs}.values():
            wrong, _ = look_through(["fit", *self._arguments(run)], read(), ["fit"])
            if wrong:
                raise InputError(f"arms.{run.arm}: {' '.join(wrong)}")

    def place(self, run: Run) -> ContinuedRun:
        """Where a run is, or will be."""
        return ContinuedRun.of(
            self.output / _file_name(run.name),
            "done.json",
            self._arguments(run),
            self.comparison.base,
            self._measuring(run),
        )

    def points(self, run: Run) -> Points:
        """What was measured of a run that is done."""
        return Points(self.place(run).folder)

    def do(self, runs: Sequence[Run], description: str) -> None:
        """Do those that are not done, as many side by side as the comparison says.

        Raises:
            InputError: one of them failed. Those at hand are finished before.
            Ended: by a signal, with all that are at hand, each after its step.
        """
        missing = [run for run in runs if not self.place(run).is_done]
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.comparison.at_once):
            slots.put(slot)
        with ThreadPoolExecutor(self.comparison.at_once) as pool:
            waiting = {pool.submit(self._do, run, slots): run for run in missing}
            try:
                for future in Progress(as_completed(waiting), description, len(waiting)):
                    future.result()
            except Ended as stop:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._processes):
                    process.terminate()
                stop.advice = "before its end; the same command goes on."
                raise
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _do(self, run: Run, slots: "SimpleQueue[int]") -> None:
        place, slot = self.place(run), slots.get()
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            measuring = self._measuring(run) | {"folder": str(place.folder)}
            command = [sys.executable, "-m", "rotopo.cli", "fit", *self._arguments(run)]
            command += [f"--trainer.callbacks+={_MEASURING}"]
            command += [f"--trainer.callbacks.{k}={_text(v)}" for k, v in measuring.items()]
            command += [f"--trainer.default_root_dir={place.folder}"]
            command += from_last_checkpoint(place.folder)
            with (place.folder / "log.txt").open("a", encoding="utf-8") as log:
                status = self._status(command, log, self._environment(slot))
            if status:
                last = (place.folder / "log.txt").read_text("utf-8").strip().splitlines()[-1:]
                raise InputError(
                    f"{run.name} ended with status {status} ({''.join(last)}): see "
                    f"{place.folder / 'log.txt'}."
                )
            place.finish(asdict(run))
        finally:
            slots.put(slot)

    def _status(self, command: list[str], log: IO[str], environment: dict[str, str]) -> int:
        """Of a command, which a signal to this one ends too."""
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
            self._processes.add(process)
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    def _arguments(self, run: Run) -> list[str]:
        """Of ``rotopo fit``, but for what only says where the run is."""
        comparison = self.comparison
        own = int(hashlib.sha256(f"{run.arm} {run.seed}".encode()).hexdigest()[:7], 16)
        return [
            *(f"--config={file}" for file in comparison.base),
            f"--config={json.dumps(comparison.settings)}",
            f"--config={json.dumps(comparison.arms[run.arm].settings)}",
            f"--model.optimizer.lr={run.rate}",
            f"--data.seed={run.seed}",
            f"--seed_everything={own}",
        ]

    def _measuring(self, run: Run) -> dict[str, Any]:
        measure = {k: v for k, v in asdict(self.comparison.measure).items() if v is not None}
        # Draws of their own for each seed, so that their noise is in what varies from seed to seed.
        return measure | {"split": "validation" if run.tuning else "test", "seed": run.seed}

    def _environment(self, slot: int) -> dict[str, str]:
        """Runs side by side share the cores, and each has a GPU of its own where there are."""
        environment, at_once = dict(os.environ), self.comparison.at_once
        if at_once > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // at_once)))
            from torch import cuda

            if cuda.device_count() > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(slot % cuda.device_count())
        return environment


_MEASURING = "rotopo.compare.measuring.Measuring"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _file_name(name: str) -> str:
    """Without what a folder's name may not hold."""
    return "".join(sign if sign.isalnum() or sign in "-_.+" else "_" for sign in name)
