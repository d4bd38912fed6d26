"""Peak memory of two training steps: full fine-tuning, LoRA and the rotation, with and without
activation checkpointing."""

import functools
from typing import Any

from bench_measure import peak_memory
from bench_peers import FULL, LORA, ROTATION, Entry

from on_gpu import speed, steps
from on_gpu.journal import Case, Ended
from on_gpu.part import Place
from on_gpu.steps import Row

ROWS = {
    "LoRA": Row(Entry("rotopo", LORA)),
    "rotation": Row(Entry("rotopo", ROTATION)),
    "full": Row(Entry("rotopo", FULL), dtype="float32"),
}


def cases(place: Place) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for checkpointing in (False, True):
        for name, row in ROWS.items():
            policy = {"activation_checkpointing": True} if checkpointing else {}
            one = Row(row.entry, policy, dtype=row.dtype)
            found[name + ", checkpointing" * checkpointing] = functools.partial(measure, one, place)
    return found


def line(ended: list[Ended]) -> str:
    return "GiB: " + ", ".join(
        f"{case.name} {case.values['peak_gib']:.1f}" for case in ended if case.values
    )


def measure(row: Row, place: Place) -> dict[str, Any]:
    shape, load = speed.FIRST
    here = steps.setting(row, shape, speed._TINY_LOAD if place.tiny else load, 2, place)
    peer = steps.prepared(row, here)

    def two_steps() -> None:  # the first makes AdamW's state
        for batch in peer.batches:
            peer.step(batch)

    # MiB beyond the loaded model, but with the reference's copy.
    beyond = peak_memory(two_steps, peer.frozen, place.device) / 1024
    weights = sum(p.nbytes for p in peer.model.parameters()) / steps.GIB
    tokens = max(peer.tokens(batch) for batch in peer.batches)
    values = {"weights_gib": weights, "beyond_gib": beyond, "tokens": tokens}
    return values | ({"peak_gib": weights + beyond} | steps.memory(place.device))
