"""How many threads a command computes on: as many as there are cores that nobody else uses.

Threads of OpenMP wait for one another at the end of every operation, and by default they spin while
they do: beside other work one spins for as long as the core of another is taken. A command of ours
lets them sleep instead, and takes no core that is busy. A user's own process is left as it is.
"""

import math
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

# Any of them says that somebody has chosen: a user, torchrun, or Lightning for its ranks.
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_RANK")
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
STAT = Path("/proc/stat")
GROUP = Path("/sys/fs/cgroup")


class Reading(NamedTuple):
    """Seconds since some time: by the clock, of work on all cores of ours, and of our own work."""

    clock: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> "Reading | None":
        """None where the system does not tell, as only Linux does, and not to everybody."""
        try:
            cores = [line.split() for line in STAT.read_text("ascii").splitlines()]
        except OSError:
            return None
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        # user, nice, system, idle, iowait, irq, softirq, steal; guests' are among the user's.
        ticks = [list(map(int, times[:8])) for name, *times in cores if name in ours]
        busy = sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic(), busy, sum(os.times()[:4]))


_began: Reading | None = None


def begin(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads sleep while they wait, and look from here on at what else the cores do.

    To be called by a program, not by a library, and before torch is imported: OpenMP reads its
    settings once.
    """
    global _began
    if not environment.keys() & set(WAITS):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    _began = None if environment.keys() & set(NUMBERS) else Reading.now()


def settle(processes: int = 1, before: int | None = None) -> None:
    """Choose the number of threads and say so, once after :func:`begin`; without it nothing is
    changed.

    Args:
        processes: that compute together; several share the cores as their launcher has it.
        before: on how many threads a run that goes on has computed, which the last bits of its
            sums follow from; None where none does.
    """
    global _began
    began, _began = _began, None
    if began is None or processes > 1:
        return
    import torch  # once OpenMP's settings stand

    now = Reading.now()
    assert now is not None  # as at the beginning
    elsewhere = (now.busy - began.busy - (now.own - began.own)) / (now.clock - began.clock)
    all_cores = torch.get_num_threads()
    cores = max(1, math.ceil(min(all_cores, quota())))
    # Of a container's quota others take nothing while any of the machine's cores is idle.
    threads = min(before or free(all_cores, elsewhere), cores)
    torch.set_num_threads(threads)
    if threads < cores:
        if before:
            why = "as the run did that goes on"
        else:
            why = f"the other{'s are' if cores - threads > 1 else ' is'} busy"
        chosen = f"Computing on {threads} of {cores} cores: {why}"
        print(f"{chosen} (OMP_NUM_THREADS decides otherwise).", file=sys.stderr, flush=True)


def free(cores: int, elsewhere: float) -> int:
    """Cores to compute on: at least one.

    Args:
        cores: that there are.
        elsewhere: how many of them others have kept busy.
    """
    return max(1, min(cores, round(cores - elsewhere)))


def quota() -> float:
    """Cores' worth of time that a container is given; without end where nothing is said."""
    limit = GROUP / "cpu.max"
    try:
        if limit.exists():
            most, of = limit.read_text("ascii").split()
        else:  # the first version of control groups
            of = (GROUP / "cpu/cpu.cfs_period_us").read_text("ascii")
            most = (GROUP / "cpu/cpu.cfs_quota_us").read_text("ascii")
        return math.inf if most.strip() in ("max", "-1") else int(most) / int(of)
    except OSError:
        return math.inf
