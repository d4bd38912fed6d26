"""Where the time of a step goes: of ours as it is by default, and as the part ``speed`` found it
fastest.

``share`` is each kind's share of the time that the GPU computes, and ``idle`` of the step's the
share in which it does not. By ``place`` the step's time is sorted as tools/bench does it, which
tells attention's products from the layers'; for that every call of attention is marked, which a
compiled layer would break at, so it is only of steps that are not compiled.
"""

import functools
from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from tools.bench.peers import Rotopo
from tools.bench.profile import profile_step
from tools.on_gpu import speed, steps
from tools.on_gpu.journal import Case, Ended, Journal
from tools.on_gpu.kinds import KINDS, kind, union
from tools.on_gpu.part import Place
from tools.on_gpu.steps import Row

_STEP = "the whole step"


def cases(place: Place) -> dict[str, Case]:
    before = Journal(place.journal.with_name("speed.jsonl"))
    found: dict[str, Case] = {}
    for name in dict.fromkeys(["rotopo", speed.fastest(before.ended)]):
        found[name] = functools.partial(profile, speed.ROWS[name], place)
    return found


def line(ended: list[Ended]) -> str:
    values = ended[-1].values
    shares = values.get("share") or values.get("place") or {}
    largest = sorted(shares, key=lambda kind: shares[kind], reverse=True)[:4]
    text = f"{ended[-1].name}: " + ", ".join(f"{kind} {shares[kind]:.0%}" for kind in largest)
    return text + (f", idle {values['idle']:.0%}" if "idle" in values else "")


def profile(row: Row, place: Place) -> dict[str, Any]:
    steps.require_all(row, place)
    shape, load = speed.FIRST
    here = steps.setting(row, shape, speed.TINY_LOAD if place.tiny else load, 2, place)
    peer = steps.prepared(row, here)
    for batch in peer.batches * 2:
        peer.step(batch)
    values: dict[str, Any] = _by_kernel(peer, place) if place.on_gpu else {}
    if not row.policy.get("compile"):
        assert isinstance(peer, Rotopo)
        values["place"] = profile_step(peer, peer.batches[0])
    return values


def _by_kernel(peer: Any, place: Place) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as recorded, record_function(_STEP):
        peer.step(peer.batches[0])
        torch.cuda.synchronize()
    events = list(recorded.events())
    whole = next(e for e in events if e.name == _STEP and e.device_type == DeviceType.CPU)
    ranges = {e.name for e in events if e.device_type == DeviceType.CPU}
    # A range of ours is also there as an event of the GPU, from its first kernel to its last.
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in ranges]
    times: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in kernels:
        taken = event.time_range.elapsed_us()
        times[kind(event.name)] += taken
        names[event.name] += taken
    computing, step = sum(times.values()), whole.time_range.elapsed_us()
    busy = union([(e.time_range.start, e.time_range.end) for e in kernels])
    return {
        "share": {name: times[name] / computing for name in KINDS if times[name]},
        "idle": 1 - busy / step,
        "step_seconds": step / 1e6,
        "kernels": len(kernels),
        "longest": [
            {"name": name[:120], "share": taken / computing, "kind": kind(name)}
            for name, taken in names.most_common(25)
        ],
    }
