"""Tables that compare: rows of peers, adapters or attentions, interleaved on the same pairs."""

import argparse
import statistics
from typing import Any

import pandas as pd

from rotopo.models.settings import DtypeName
from tools.bench.measure import clock, fresh, peak_memory, progress
from tools.bench.peers import ADAPTERS, FULL, Entry, Peer, build, check_losses
from tools.bench.setting import Load, begin

KEYS = (
    "peer",
    "model",
    "dtype",
    "adapter",
    "reference",
    "prompt_ratio",
    "speed_ratio",
    "memory_ratio",
    "floor_share",
    "max_loss_difference",
)


def entries(table: str, adapter: str, attentions: list[str]) -> list[Entry]:
    """The rows of a table; those of ``adapters`` have every adapter but full fine-tuning."""
    if table == "adapters":
        return [Entry("rotopo", name) for name in ADAPTERS]
    if table == "attention":
        return [Entry(f"rotopo, {name}", adapter, "cached", name) for name in attentions]
    if table == "peers":
        return [Entry(peer, adapter) for peer in ("rotopo", "rotopo, padded", "plain", "trl")]
    if table == "compiled":
        rotopo, *online = (Entry(peer, adapter) for peer in ("rotopo, compiled", "trl, compiled"))
        return [rotopo._replace(reference="cached"), rotopo, *online, Entry("trl", adapter)]
    cached = [Entry(peer, adapter, "cached") for peer in ("rotopo", "plain", "trl")]
    return cached + [Entry(peer, adapter) for peer in ("plain", "trl")]


def compare(
    table: str, dtype: DtypeName, load: Load, adapter: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A table's rows: the keys of ``--json``, and those that are only printed."""
    rows = entries(table, adapter, arguments.attention)
    memory = {}
    for number, entry in enumerate(rows, 1):
        progress(f"{table}, {dtype}: memory of row {number} of {len(rows)}")
        memory[entry] = fresh(_peak_memory, entry, dtype, load, arguments)
    seconds, losses, tokens, P, C = fresh(_times, rows, dtype, load, arguments)
    progress("")

    found, base = [], rows[0]
    # The last token of a response predicts nothing: it needs no pass.
    needed = P + C - 2 * load.pairs * arguments.rounds
    for entry in rows:
        ratios = [t / ours for t, ours in zip(seconds[entry], seconds[base], strict=True)]
        differences = [abs(a - b) for a, b in zip(losses[entry], losses[base], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        # A forward and a backward pass through the activations and, where the weights train,
        # another backward one for them; then the reference's forward pass, if online.
        least = 3 if entry.adapter == FULL else 2
        passes = least + (entry.reference == "online")
        found.append(
            {
                "peer": entry.peer,
                "model": arguments.model,
                "dtype": dtype,
                "adapter": entry.adapter,
                "reference": entry.reference,
                "prompt_ratio": 2 * P / C,
                "speed_ratio": median,
                "memory_ratio": memory[base] / memory[entry],
                "floor_share": least * needed / (passes * tokens[entry]),
                "max_loss_difference": max(differences) if entry.adapter == base.adapter else None,
                "quartiles": f"{low:.2f} to {high:.2f}",
                "pairs_per_second": load.pairs / statistics.median(seconds[entry]),
                "peak_mib": memory[entry],
            }
        )
    return found


def show(
    table: str, found: list[dict[str, Any]], load: Load, arguments: argparse.Namespace
) -> None:
    first = found[0]
    print(
        f"\n{table}: {arguments.model}, {first['dtype']} on {arguments.device}, "
        f"{arguments.threads} thread(s), {load.pairs} pairs a step, context {load.context}, "
        f"{first['prompt_ratio']:.2f} prompt tokens per response token, {arguments.rounds} "
        f"rounds, {arguments.layout} {arguments.policy or ''}"
    )
    shared = ("model", "dtype", "prompt_ratio")
    frame = pd.DataFrame(found).drop(columns=list(shared))
    print(frame.to_string(index=False, float_format="{:.4g}".format, na_rep="-"), flush=True)


def _peak_memory(
    entry: Entry, dtype: DtypeName, load: Load, arguments: argparse.Namespace
) -> float:
    """MiB at the peak of two steps; the first makes AdamW's state."""
    setting = begin(arguments, dtype, [load] * 2)
    peer = build(entry, setting)

    def steps() -> None:
        for batch in peer.batches:
            peer.step(batch)

    return peak_memory(steps, peer.frozen, arguments.device)


def _times(
    rows: list[Entry], dtype: DtypeName, load: Load, arguments: argparse.Namespace
) -> tuple[dict[Entry, list[float]], dict[Entry, list[float]], dict[Entry, int], int, int]:
    """Per row: seconds and losses of the timed steps, tokens of one pass over all of them; then the
    tokens of the prompts and of the responses."""
    setting = begin(arguments, dtype, [load] * (arguments.warm_up + arguments.rounds))
    peers: dict[Entry, Peer] = {}
    for entry in rows:
        progress(f"{entry.adapter}, {dtype}: preparing {entry.peer}, {entry.reference}")
        peers[entry] = build(entry, setting)
    if dtype == "float32" and len({entry.adapter for entry in rows}) == 1:
        check_losses(peers)
    now = clock(arguments.device, arguments.threads)
    seconds: dict[Entry, list[float]] = {entry: [] for entry in rows}
    losses: dict[Entry, list[float]] = {entry: [] for entry in rows}
    tokens = dict.fromkeys(rows, 0)
    for turn in range(-arguments.warm_up, arguments.rounds):
        for entry, peer in peers.items():
            batch = peer.batches[turn + arguments.warm_up]
            progress(
                f"{entry.adapter}, {dtype}: round {turn + 1} of {arguments.rounds}, {entry.peer}"
            )
            began = now()
            loss = peer.step(batch)
            took = now() - began
            if turn >= 0:
                seconds[entry].append(took)
                losses[entry].append(loss)
                tokens[entry] += peer.tokens(batch)
    timed = [row for batch in setting.batches[arguments.warm_up :] for row in batch]
    P, C = sum(len(r.prompt) for r in timed), sum(len(y) for r in timed for y in r.responses)
    return seconds, losses, tokens, P, C
