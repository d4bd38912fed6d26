"""Several ranks of the command, forked from the tests' process, which has imported everything."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from rotopo.cli import run

STRATEGIES = Path(__file__).parents[1] / "configs" / "strategies"


def strategy(name: str) -> list[str]:
    """Options of a file of configs/strategies, on processors."""
    return ["--config", str(STRATEGIES / f"{name}.yaml"), "--trainer.accelerator=cpu"]


def on_ranks(n: int, *arguments: str, timeout: float = 120) -> None:
    """Run the command on n ranks, as torchrun would start them.

    Raises:
        RuntimeError: a rank failed, with what it printed, or did not end in time.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [_start(rank, n, port, [*arguments, f"--trainer.devices={n}"]) for rank in range(n)]
    deadline = time.monotonic() + timeout
    failed = {}
    waiting = dict(processes)
    while waiting and time.monotonic() < deadline and not failed:
        for process in list(waiting):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                output = waiting.pop(process)
                if status:
                    failed[process] = output
        time.sleep(0.02)
    for process in waiting:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    outputs = [os.pread(output, 100_000, 0).decode() for output in (failed or waiting).values()]
    for _, output in processes:
        os.close(output)
    if outputs:
        raise RuntimeError("\n".join(["failed" if failed else "too slow", *outputs]))


def _start(rank: int, n: int, port: int, arguments: list[str]) -> tuple[int, int]:
    output = os.memfd_create("output")
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process, output
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        os.environ |= {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "tests",
        }
        run(arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
