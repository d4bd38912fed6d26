"""Training steps of rotopo in its settings, beside a plain padded one and TRL's.

Each row is built, warmed up and timed by itself, on the same pairs, from the same weights. Values:
  pairs_per_second  of four batches of different lengths, each at the median of its rounds
  mfu               of what the model has to do (every prompt and response once, forward and
                    backward, an online reference forward) per second, the share of what a large
                    bfloat16 product reaches here; all rows of a table have the same to do
  floor_share       token passes of the floor (prompts and responses once, forward and backward)
                    over those that the row makes
  warm_up_seconds   the first round, less a later one: compiling, and whatever else comes once
  loss              of the first batch before any step, in bfloat16; in float32 the losses of ours,
                    the plain step and TRL's are compared first
"""

import functools
import statistics
import time
from typing import Any

import torch

from tools.bench.peers import FULL, LORA, ROTATION, Entry, build, check_losses
from tools.bench.setting import Load
from tools.on_gpu import steps
from tools.on_gpu.journal import Case, Ended, Journal
from tools.on_gpu.part import Place
from tools.on_gpu.steps import Row, rotopo

_BATCHES, _ROUNDS = 4, 4
FLEX = {"attention": "flex_attention"}
ROWS = {
    "rotopo": rotopo(),
    "plain": Row(Entry("plain")),
    "TRL": Row(Entry("trl")),
    "TRL, Liger": Row(Entry("trl"), trl={"use_liger_kernel": True}, needs=("GPU", "liger_kernel")),
    "rotopo, flex": rotopo("GPU", **FLEX),
    "rotopo, compiled": rotopo("compiled", compile=True),
    "rotopo, flex, compiled": rotopo("GPU", "compiled", **FLEX, compile=True),
    "rotopo, sdpa": rotopo(attention="sdpa"),
    "rotopo, cached": rotopo(reference="cached"),
    "TRL, cached": Row(Entry("trl", LORA, "cached")),
    "rotopo, rotation": rotopo(adapter=ROTATION),
    "rotopo, rotation, compiled": rotopo("compiled", adapter=ROTATION, compile=True),
    "rotopo, full, float32": Row(Entry("rotopo", FULL), dtype="float32"),
    "rotopo, full, bfloat16": Row(
        Entry("rotopo", FULL),
        {"compute_dtype": "bfloat16"},
        dtype="float32",
        needs=("policy.compute_dtype",),
    ),
}
FIRST = ("qwen2-0.5b", Load(4, 2048, 1.0))
# With what time is left: longer pairs and a larger model.
THEN = [
    ("qwen2-0.5b", Load(1, 8192, 1.0)),
    ("llama-1b", Load(4, 2048, 1.0)),
    ("llama-1b", Load(1, 8192, 1.0)),
]
_THEN_ROWS = ("rotopo", "plain", "TRL", "rotopo, flex", "rotopo, compiled")
_TINY_ROWS = ("rotopo", "plain", "TRL", "rotopo, flex", "rotopo, compiled")
TINY_LOAD = Load(2, 24, 1.0)
PRODUCT = "a large product"


def cases(place: Place) -> dict[str, Case]:
    found: dict[str, Case] = {
        PRODUCT: lambda: product(place),
        "the same losses": lambda: same_losses(place),
    }
    rows = {n: row for n, row in ROWS.items() if not place.tiny or n in _TINY_ROWS}
    for name, row in rows.items():
        found[named(name, *FIRST)] = functools.partial(measure, name, row, *FIRST, place)
    for (shape, load), name in ((k, n) for k in THEN if not place.tiny for n in _THEN_ROWS):
        case = functools.partial(measure, name, ROWS[name], shape, load, place)
        found[named(name, shape, load)] = case
    return found


def named(row: str, shape: str, load: Load) -> str:
    return f"{row}: {shape}, {load.pairs} × {load.context}"


def fastest(ended: list[Ended], load: tuple[str, Load] = FIRST) -> str:
    """The row of ours with an online reference and LoRA that makes the most pairs a second."""
    rates = {
        name: case.values["pairs_per_second"]
        for case in ended
        for name, row in ROWS.items()
        if case.name == named(name, *load)
        and row.entry == Entry("rotopo")
        and "pairs_per_second" in case.values
    }
    return max(rates, key=lambda name: rates[name], default="rotopo")


def line(ended: list[Ended]) -> str:
    """The fastest of ours on the first load, beside the others."""
    found = {case.name: case.values for case in ended}
    best = fastest(ended)
    values = found.get(named(best, *FIRST), {})
    if "pairs_per_second" not in values:
        return ""
    rate = values["pairs_per_second"]
    text = f"{best} {rate:.1f} pairs/s"
    if "mfu" in values:
        text += f", MFU {values['mfu']:.2f}"
    for name in ("rotopo", "plain", "TRL", "TRL, Liger"):
        other = found.get(named(name, *FIRST), {}).get("pairs_per_second")
        if other and name != best:
            text += f", {rate / other:.1f} × {name}"
    return text


def product(place: Place) -> dict[str, Any]:
    """What the device reaches in a bfloat16 product of 8192 × 8192 random matrices."""
    n = 256 if place.tiny else 8192
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(12):
        if place.on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if place.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"tflops": 2 * n**3 / statistics.median(seconds[2:]) / 1e12, "size": n}


def same_losses(place: Place) -> dict[str, Any]:
    """Ours, the plain step's and TRL's in float32, without TF32: one that differs ends the case."""
    torch.set_float32_matmul_precision("highest")
    load = TINY_LOAD if place.tiny else Load(2, 256, 1.0)
    peers = {}
    for name in ("rotopo", "plain", "TRL"):
        row = Row(ROWS[name].entry, dtype="float32")
        peers[row.entry] = build(row.entry, steps.setting(row, FIRST[0], load, 1, place))
    check_losses(peers)
    return {}


def measure(name: str, row: Row, shape: str, load: Load, place: Place) -> dict[str, Any]:
    steps.require_all(row, place)
    here = steps.setting(row, shape, TINY_LOAD if place.tiny else load, _BATCHES, place)
    try:
        return _measured(row, here, place)
    except torch.cuda.OutOfMemoryError:
        if row.entry.peer == "rotopo":
            raise
        return {"out_of_memory": True}  # a peer's result


def _measured(row: Row, here: steps.Setting, place: Place) -> dict[str, Any]:
    peer = steps.prepared(row, here)
    loss = peer.backward(peer.batches[0]).item()
    peer.optimizer.zero_grad()
    rounds = [
        [steps.timed(peer, batch, place.device) for batch in peer.batches]
        for _ in range(1 + (2 if place.tiny else _ROUNDS))
    ]
    seconds = sum(statistics.median(times) for times in zip(*rounds[1:], strict=True))
    work = steps.work(peer, row, here)
    pairs = sum(map(len, here.batches))
    values = {
        "pairs_per_second": pairs / seconds,
        "step_seconds": seconds / len(here.batches),
        "warm_up_seconds": sum(rounds[0]) - seconds,
        "floor_share": work.least / work.made,
        "tflops": work.flops / seconds / 1e12,
        "loss": loss,
    } | steps.memory(place.device)
    reached = [c.values["tflops"] for c in Journal(place.journal).ended if c.name == PRODUCT]
    if reached:
        values["mfu"] = values["tflops"] / reached[0]
    return values
