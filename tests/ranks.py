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


def on_ranks(
    n: int, *arguments: str, starter: str = "torchrun", nodes: int = 1, timeout: float = 120
) -> None:
    """Run the command on n ranks.

    Args:
        n: how many.
        arguments: the command's.
        starter: whose environment they get, ``torchrun`` or ``srun``.
        nodes: into how many groups, which take each other for different machines.
        timeout: seconds.

    Raises:
        RuntimeError: a rank failed, with what it printed, or did not end in time.
    """
    port = free_port()
    where = [f"--trainer.devices={n // nodes}", f"--trainer.num_nodes={nodes}"]
    processes = [
        _start(environment(starter, rank, n, nodes, port), [*arguments, *where])
        for rank in range(n)
    ]
    deadline = time.monotonic() + timeout
    failed = {}
    waiting = dict(processes)
    while waiting and time.monotonic() < deadline:
        for process in list(waiting):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                output = waiting.pop(process)
                if status:
                    failed[process] = output
                    os.write(output, f"\nstatus {os.waitstatus_to_exitcode(status)}\n".encode())
                    # The others may fail by themselves.
                    deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.02)
    for process in waiting:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    outputs = [os.pread(output, 100_000, 0).decode() for output in (failed or waiting).values()]
    for _, output in processes:
        os.close(output)
    if outputs:
        raise RuntimeError("\n".join(["failed" if failed else "too slow", *outputs]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(starter: str, rank: int, n: int, nodes: int, port: int) -> dict[str, str]:
    """What a rank finds in its environment, as torchrun or SLURM document it."""
    node, local = divmod(rank, n // nodes)
    if starter == "torchrun":
        variables = {
            "MASTER_ADDR": "localhost",
            "WORLD_SIZE": n,
            "LOCAL_WORLD_SIZE": n // nodes,
            "RANK": rank,
            "LOCAL_RANK": local,
            "GROUP_RANK": node,
            "TORCHELASTIC_RUN_ID": "tests",
        }
    else:
        variables = {
            "SLURM_JOB_ID": 1234,
            "SLURM_JOB_NAME": "align",
            "SLURM_NTASKS": n,
            "SLURM_NTASKS_PER_NODE": n // nodes,
            "SLURM_NNODES": nodes,
            "SLURM_NODELIST": "localhost,another" if nodes > 1 else "localhost",
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": local,
            "SLURM_NODEID": node,
        }
    return {name: str(value) for name, value in variables.items()} | {"MASTER_PORT": str(port)}


def _start(given: dict[str, str], arguments: list[str]) -> tuple[int, int]:
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
        os.environ |= given
        run(arguments)
        status = 0
    except SystemExit as stop:  # which has said why
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
