"""Peak memory of two training steps: full fine-tuning, LoRA and the rotation, with and without
activation checkpointing; and beside it what ``rotopo plan`` says, where the package has it."""

import functools
import importlib.util
from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from rotopo.data.batch import Role, TokenizedRow
from tools.bench.measure import peak_memory
from tools.bench.peers import FULL, ROTATION, Entry, Rotopo
from tools.bench.setting import SHAPES, Load
from tools.on_gpu import speed, steps
from tools.on_gpu.journal import Case, Ended, WrongResultError
from tools.on_gpu.part import Place
from tools.on_gpu.steps import Row, rotopo

ROWS = {
    "LoRA": rotopo(),
    "rotation": rotopo(adapter=ROTATION),
    "full": Row(Entry("rotopo", FULL), dtype="float32"),
    "full, bfloat16": Row(
        Entry("rotopo", FULL),
        {"compute_dtype": "bfloat16"},
        dtype="float32",
        needs=("policy.compute_dtype",),
    ),
}
# How far a plan may be off.
_ALLOWED = 0.1


def cases(place: Place) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for checkpointing in (False, True):
        for name, row in ROWS.items():
            policy = row.policy | ({"activation_checkpointing": True} if checkpointing else {})
            case = functools.partial(measure, replace(row, policy=policy), place)
            found[name + ", checkpointing" * checkpointing] = case
    return found


def line(ended: list[Ended]) -> str:
    found = {case.name: case.values for case in ended if case.values}
    texts = [f"{name} {values['peak_gib']:.1f}" for name, values in found.items()]
    off = [abs(v["planned_share"] - 1) for v in found.values() if "planned_share" in v]
    plans = f"plans off by {max(off):.0%} at most; " if off else ""
    return f"{plans}GiB: " + ", ".join(texts)


def measure(row: Row, place: Place) -> dict[str, Any]:
    steps.require_all(row, place)
    shape, load = ("tiny", speed.TINY_LOAD) if place.tiny else speed.FIRST
    here = steps.setting(row, shape, load, 1, place)
    peer = steps.prepared(row, replace(here, batches=[_equal_pairs(load)] * 2))
    assert isinstance(peer, Rotopo)

    def two_steps() -> None:  # the first makes AdamW's state
        for batch in peer.batches:
            peer.step(batch)

    # MiB beyond the loaded model, but with the reference's copy.
    beyond = peak_memory(two_steps, peer.frozen, place.device) / 1024
    weights = sum(p.nbytes for p in peer.model.parameters()) / steps.GIB
    values = {
        "weights_gib": weights,
        "beyond_gib": beyond,
        "peak_gib": weights + beyond,
        "tokens": peer.tokens(peer.batches[0]),
    } | steps.memory(place.device)
    if importlib.util.find_spec("rotopo.plan") is not None:
        values["planned_gib"] = _planned(peer, shape, load, row) / steps.GIB
        if place.on_gpu:
            values["planned_share"] = values["planned_gib"] / values["peak_gib"]
            if abs(values["planned_share"] - 1) > _ALLOWED:
                raise WrongResultError(f"planned {values['planned_share']:.2f} of it", values)
    return values


def _equal_pairs(load: Load) -> list[TokenizedRow]:
    """Pairs of one size, as a plan is made for them."""
    prompt, response = _lengths(load)
    ids = [3 + i % 200 for i in range(prompt + response)]
    both = [ids[prompt:], ids[prompt:]]
    return [
        TokenizedRow(ids[:prompt], both, [Role.CHOSEN, Role.REJECTED], row)
        for row in range(load.pairs)
    ]


def _lengths(load: Load) -> tuple[int, int]:
    """Tokens of a prompt and of a response."""
    response = round(load.context / (1 + load.prompt_ratio))
    return load.context - response, response


def _planned(peer: Rotopo, shape: str, load: Load, row: Row) -> int:
    """Bytes at the peak by ``rotopo plan``."""
    from rotopo.plan.load import Load as PlannedLoad
    from rotopo.plan.memory import planner

    again = bool(row.policy.get("activation_checkpointing"))
    config = AutoConfig.for_model(**SHAPES[shape])
    with planner(peer.module, config, checkpointing=again) as memory:
        return memory(PlannedLoad(load.pairs, *_lengths(load))).peak
