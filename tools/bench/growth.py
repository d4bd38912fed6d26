"""How a step's time and memory grow with the context, and with the pairs of a batch."""

import argparse
import statistics
from functools import partial

import numpy as np
import pandas as pd

from rotopo.models.settings import DtypeName
from tools.bench.measure import clock, peak_memory, progress
from tools.bench.peers import Entry, Rotopo, checked
from tools.bench.profile import profile_step
from tools.bench.setting import Load, begin


def loads_of(ratio: float, arguments: argparse.Namespace) -> tuple[list[Load], list[Load]]:
    """Contexts at the longest one's tokens a step, and batches of pairs at the first context."""
    contexts, pairs = sorted(arguments.growth_contexts), sorted(arguments.growth_pairs)
    return (
        [Load(max(1, contexts[-1] // context), context, ratio) for context in contexts],
        [Load(n, arguments.context[0], ratio) for n in pairs],
    )


def growth(
    dtype: DtypeName, ratio: float, adapter: str, reference: str, arguments: argparse.Namespace
) -> list[tuple[pd.DataFrame, float, float]]:
    """For the contexts and for the batches: the rows, and their peak memory's least-squares slope
    in MiB per 1000 tokens with the farthest that a row lies from that line, as a share.

    The tokens of the slope are those of a context, or of a batch.
    """
    parts = loads_of(ratio, arguments)
    loads = [load for part in parts for load in part]
    setting = begin(arguments, dtype, loads)
    progress(f"growth, {dtype}, {adapter}: preparing")
    peer = checked(Entry("rotopo", adapter, reference), setting)
    assert isinstance(peer, Rotopo)
    tokens = [
        sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows)
        for rows in setting.batches
    ]
    peer.step(peer.batches[0])  # makes AdamW's state
    peaks = []
    for number, batch in enumerate(peer.batches, 1):
        progress(f"growth, {dtype}, {adapter}: memory of {number} of {len(loads)}")
        one_step = partial(peer.step, batch)
        peaks.append(peak_memory(one_step, peer.frozen, arguments.device))
    now = clock(arguments.device, arguments.threads)
    seconds: list[list[float]] = [[] for _ in loads]
    for turn in range(arguments.rounds):
        for number, batch in enumerate(peer.batches):
            progress(
                f"growth, {dtype}, {adapter}: round {turn + 1} of {arguments.rounds}, "
                f"{number + 1} of {len(loads)}"
            )
            began = now()
            peer.step(batch)
            seconds[number].append(now() - began)
    attention = []
    for number, batch in enumerate(peer.batches, 1):
        progress(f"growth, {dtype}, {adapter}: profile of {number} of {len(loads)}")
        attention.append(profile_step(peer, batch)["attention"])
    progress("")

    found, first = [], 0
    for part, unit in zip(parts, ("token", "pair"), strict=True):
        count = [
            n if unit == "token" else load.pairs for n, load in zip(tokens, loads, strict=True)
        ]
        rows = []
        for i in range(first, first + len(part)):
            each = 1000 * statistics.median(seconds[i]) / count[i]
            ratios = [
                (here / count[i]) / (start / count[first])
                for here, start in zip(seconds[i], seconds[first], strict=True)
            ]
            low, median, high = statistics.quantiles(ratios, n=4)
            rest = (1 - attention[i]) / (1 - attention[first])
            rows.append(
                {
                    "context": loads[i].context,
                    "pairs": loads[i].pairs,
                    "tokens": tokens[i],
                    f"ms_per_{unit}": each,
                    "to_first": median,
                    "quartiles": f"{low:.2f} to {high:.2f}",
                    "attention": attention[i],
                    "ms_without": each * (1 - attention[i]),
                    "without_to_first": median * rest,
                    "peak_mib": peaks[i],
                }
            )
        frame = pd.DataFrame(rows)
        x = frame["context" if unit == "token" else "tokens"] / 1000
        slope, start = np.polyfit(x, frame["peak_mib"], 1) if len(frame) > 1 else (np.nan, np.nan)
        off = ((slope * x + start) / frame["peak_mib"] - 1).abs().max()
        found.append((frame, float(slope), float(off)))
        first += len(part)
    return found


def show_growth(
    dtype: DtypeName,
    ratio: float,
    adapter: str,
    reference: str,
    arguments: argparse.Namespace,
    found: list[tuple[pd.DataFrame, float, float]],
) -> None:
    print(
        f"\ngrowth: rotopo, {arguments.model}, {dtype} on {arguments.device}, "
        f"{arguments.threads} thread(s), {adapter}, {reference} reference, prompt ratio "
        f"{ratio:g}, {arguments.rounds} rounds"
    )
    for (frame, slope, off), of in zip(found, ("the context", "a step"), strict=True):
        print(frame.to_string(index=False, float_format="{:.4g}".format))
        if len(frame) > 1:
            print(
                f"Peak memory grows by {slope:.4g} MiB per 1000 tokens of {of} (least squares; "
                f"rows lie within {100 * off:.0f} % of the line).",
                flush=True,
            )
