"""How benchmarks measure: their clock, peak memory, and processes of their own."""

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from ctypes import CDLL
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rotopo.callbacks import speed

T = TypeVar("T")


def fresh(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result, from a process that nothing was measured in before."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that the processes are forked from.
    context.set_forkserver_preload(["trl.trainer.dpo_trainer", "rotopo.objectives"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def clock(device: str, threads: int) -> Callable[[], float]:
    """Seconds; on one thread those for which the processor ran this process, and on a GPU read once
    it has done all that it was given."""
    if device == "cuda":
        return _after_the_gpu
    return time.process_time if threads == 1 else time.perf_counter


def _after_the_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def progress(text: str) -> None:
    """One line of standard error, written over the last."""
    print(f"\r\033[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


def peak_memory(step: Callable[[], Any], copy: nn.Module | None, device: str) -> float:
    """MiB that ``step`` takes at its peak beyond what is held before it.

    Args:
        step: what is measured.
        copy: a frozen copy of the model, which is held before and counts all the same.
        device: where the model is.
    """
    held_anyway = sum(p.nbytes for p in copy.parameters()) if copy is not None else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # What earlier steps took and have freed would hide what this one takes.
        gc.collect()
        CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # let Linux forget the peak so far
    where = torch.device(device)
    before = speed.peak_memory(where)
    step()
    peak = speed.peak_memory(where)
    assert before is not None  # Linux tells both
    assert peak is not None
    return (peak - before + held_anyway) / 2**20
