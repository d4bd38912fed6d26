"""Commands in forks of a server that has imported everything, to be killed where it hurts.

A fork of the tests' own process would not do: torch refuses to go backward in a fork of a process
that has gone backward before.
"""

import io
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.utils.tensorboard

from rotopo import checkpoints, files
from rotopo.cli import main
from rotopo.data import token_cache
from rotopo.models import policy, reference_cache  # noqa: F401
from rotopo.training import PairwiseModule

torch.set_num_threads(1)


def _half_a_checkpoint(strike: Callable[[], None], original: Callable, *args: Any) -> None:
    value, stream = args
    whole = io.BytesIO()
    original(value, whole)
    half = len(whole.getvalue()) // 2
    stream.write(whole.getvalue()[:half])
    stream.flush()
    strike()
    stream.write(whole.getvalue()[half:])


def _first(strike: Callable[[], None], original: Callable, *args: Any, **settings: Any) -> Any:
    strike()
    return original(*args, **settings)


def _then(strike: Callable[[], None], original: Callable, *args: Any, **settings: Any) -> Any:
    result = original(*args, **settings)
    strike()
    return result


# Where a command can be struck: what is called there, and how.
MOMENTS: dict[str, tuple[Any, str, Callable]] = {
    "half a checkpoint is written": (checkpoints.torch, "save", _half_a_checkpoint),
    "a file has no name yet": (files.os, "fsync", _then),
    "an old checkpoint is to go": (checkpoints.WholeCheckpointIO, "remove_checkpoint", _first),
    "in a step": (torch.optim.AdamW, "step", _first),
    "behind a step": (torch.optim.AdamW, "step", _then),
    "in a validation": (PairwiseModule, "validation_step", _then),
    "tokens are written": (datasets.Dataset, "save_to_disk", _then),
    "the log is written": (token_cache.json, "dumps", _first),
}


def _plant(moment: str, count: int, number: signal.Signals) -> None:
    """Have this process struck at the moment that comes for the count-th time."""
    owner, name, how = MOMENTS[moment]
    original, calls = getattr(owner, name), itertools.count(1)

    def struck(*args: Any, **settings: Any) -> Any:
        if next(calls) == count:
            return how(lambda: os.kill(os.getpid(), number), original, *args, **settings)
        return original(*args, **settings)

    setattr(owner, name, struck)


def _command(
    arguments: list[str], log: Path, cache: Path, fault: tuple[str, int, signal.Signals] | None
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers
    with log.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ["ROTOPO_CACHE"] = str(cache)
    datasets.config.HF_DATASETS_CACHE = cache / "datasets"
    if fault is not None:
        _plant(*fault)
    main(arguments)


def start(
    arguments: list[str],
    log: Path,
    cache: Path,
    fault: tuple[str, int, signal.Signals] | None = None,
) -> ForkServerProcess:
    """Start ``rotopo`` in a fork.

    Args:
        arguments: its own.
        log: file that what it prints is put behind.
        cache: its cache folder.
        fault: the moment, which time of it, and the signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forks"])
    process = context.Process(target=_command, args=(arguments, log, cache, fault))
    process.start()
    return process
