"""Commands in forks of a server that has imported everything, to be killed where it hurts.

A fork of the tests' own process would not do: torch refuses to go backward in a fork of a process
that has gone backward before.
"""

import io
import itertools
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch

# Imported here so that no fork has to.
import torch.utils.tensorboard
from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

from rotopo import files
from rotopo.cli import main
from rotopo.data import token_cache
from rotopo.models import reference_cache
from rotopo.rotation import tuner  # noqa: F401
from rotopo.run import checkpoints
from rotopo.training import PairwiseModule

torch.set_num_threads(1)


@dataclass(frozen=True)
class Fault:
    """A signal at a moment of :data:`MOMENTS`, when it comes for the count-th time."""

    moment: str
    count: int
    signal: signal.Signals

    def plant(self) -> None:
        """Have this process struck."""
        owner, name, how = MOMENTS[self.moment]
        original, calls = getattr(owner, name), itertools.count(1)

        def struck(*args: Any, **settings: Any) -> Any:
            if next(calls) == self.count:
                return how(self.strike, original, *args, **settings)
            return original(*args, **settings)

        setattr(owner, name, struck)

    def strike(self) -> None:
        os.kill(os.getpid(), self.signal)


@dataclass(frozen=True)
class FileLimit(Fault):
    """No file may get larger than so many bytes from then on."""

    limit: int = 0

    def strike(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


def _half(strike: Callable[[], None], save: Callable, value: Any, stream: Any) -> None:
    whole = io.BytesIO()
    save(value, whole)
    half = len(whole.getvalue()) // 2
    stream.write(whole.getvalue()[:half])
    stream.flush()
    strike()
    stream.write(whole.getvalue()[half:])


def _before(strike: Callable[[], None], original: Callable, *args: Any, **settings: Any) -> Any:
    strike()
    return original(*args, **settings)


def _behind(strike: Callable[[], None], original: Callable, *args: Any, **settings: Any) -> Any:
    result = original(*args, **settings)
    strike()
    return result


# Where a command can be struck: what is called there, and how.
MOMENTS: dict[str, tuple[Any, str, Callable]] = {
    "half a checkpoint is written": (checkpoints.torch, "save", _half),
    "a file has no name yet": (files.os, "fsync", _behind),
    "an old checkpoint is to go": (checkpoints.WholeCheckpointIO, "remove_checkpoint", _before),
    "before a step": (torch.optim.AdamW, "step", _before),
    "behind a step": (torch.optim.AdamW, "step", _behind),
    "in a validation": (PairwiseModule, "validation_step", _behind),
    "tokens have no name yet": (token_cache, "_save", _behind),
    "log-probs are written": (reference_cache.pa.ipc, "new_file", _before),
}
assert reference_cache.pa is pa


def _command(
    arguments: list[str], log: Path, cache: Path, fault: Fault | None, environment: dict[str, str]
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers
    # As in a terminal, even where the tests run in the background and ignore them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with log.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ |= environment | {"ROTOPO_CACHE": str(cache)}
    datasets.config.HF_DATASETS_CACHE = cache / "datasets"
    if fault is not None:
        fault.plant()
    main(arguments)


def start(
    arguments: list[str],
    log: Path,
    cache: Path,
    fault: Fault | None = None,
    environment: dict[str, str] = {},  # noqa: B006
) -> ForkServerProcess:
    """Start ``rotopo`` in a fork.

    Args:
        arguments: its own.
        log: file that what it prints is put behind.
        cache: its cache folder.
        fault: what happens to it.
        environment: variables that it finds beside those of the tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forks"])
    process = context.Process(target=_command, args=(arguments, log, cache, fault, environment))
    process.start()
    return process
