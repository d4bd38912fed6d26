"""Where a step's time goes, and what the matrix products of its floor would take alone."""

import argparse
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotopo.errors import InputError
from rotopo.models.settings import DtypeName
from tools.bench.measure import clock, progress
from tools.bench.peers import FULL, OPTIMISER, Entry, Rotopo, checked
from tools.bench.setting import Load, Setting, begin

KINDS = (
    "layers' matrix products",
    "head",
    "attention",
    "element-wise",
    "copies",
    "optimiser",
    "Python and other",
)
_STEP, _ATTENTION = "whole step", "attention"
_BACKWARD = 1  # at::RecordScope::BACKWARD_FUNCTION
# Token rows of the head's products alone: large enough for their full rate.
_HEAD_ROWS = 256

_PRODUCTS = re.compile(r"mm|linear|matmul|gemm|einsum")
_COPIES = re.compile(r"copy|clone|contiguous|::to$|::cat|index|gather|scatter|embedding|fill_|zero")
# They move nothing: what they take is the time of calling them.
_CALLS = re.compile(
    r"::(_?unsafe_|_)?(view|reshape|reshape_alias|transpose|permute|t|expand|slice|select|squeeze"
    r"|unsqueeze|as_strided|detach|alias|empty|empty_like|empty_strided|chunk|split|narrow"
    r"|flatten|unflatten|result_type|item|local_scalar_dense)$"
)


def profile_step(peer: Rotopo, batch: Any) -> dict[str, float]:
    """Each kind's share of one step's time; they add up to 1."""
    activities = [ProfilerActivity.CPU]
    on_gpu = batch.input_ids.is_cuda
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with _marked_attention(peer.policy.language_model.config._attn_implementation):
        if peer.policy.compiled:
            peer.step(batch)  # which compiles around the mark
        with (
            torch.profiler.profile(activities=activities, record_shapes=True) as recorded,
            record_function(_STEP),
        ):
            peer.step(batch)
    events = [e for e in recorded.events() if e.device_type == DeviceType.CPU]
    vocabulary = peer.policy.language_model.config.get_text_config().vocab_size
    kinds = _Kinds(events, vocabulary)
    total = next(e for e in events if e.name == _STEP).cpu_time_total
    times: Counter[str] = Counter()
    for event in events:
        times[kinds.of(event)] += (
            event.self_device_time_total if on_gpu else event.self_cpu_time_total
        )
    # On a processor that is the rest already; on a GPU also all that it spends waiting.
    times[KINDS[-1]] = total - sum(times[kind] for kind in KINDS[:-1])
    return {kind: times[kind] / total for kind in KINDS}


class _Kinds:
    """Sorts profiled events into KINDS.

    A backward event belongs to attention if the forward event that made its node does: autograd
    numbers its nodes, and the node of a number is made by the last forward event that reports it.
    """

    def __init__(self, events: list[Any], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._where: dict[int, str | None] = {}
        self._attention: set[int] = set()
        makers: dict[int, Any] = {}
        for event in sorted(events, key=lambda e: e.time_range.start):
            # The engine reports a node's number too, around its backward event.
            backward = event.scope == _BACKWARD or event.name.startswith("autograd::engine")
            if not backward and event.sequence_nr >= 0:
                makers[event.sequence_nr] = event
        self._attention = {n for n, event in makers.items() if self._place(event) == _ATTENTION}
        self._where.clear()

    def of(self, event: Any) -> str:
        place = self._place(event)
        if place is not None:
            return place
        if event.name.startswith("aten::embedding"):
            return "copies"
        if any(self.vocabulary in shape for shape in event.input_shapes or ()):
            return "head"
        name = event.name
        if _CALLS.search(name) or not name.startswith(
            ("aten::", "mkldnn::", "onednn::", "prims::")
        ):
            # Compiled kernels are the element-wise rest; all others are Python and autograd.
            return "element-wise" if re.search("triton|fused|Compiled", name) else KINDS[-1]
        if _PRODUCTS.search(name):
            return KINDS[0]
        return "copies" if _COPIES.search(name) else "element-wise"

    def _place(self, event: Any) -> str | None:
        """``attention``, ``optimiser`` or ``head`` for what runs inside one, else None."""
        if event.id not in self._where:
            if event.name in (_ATTENTION, OPTIMISER):
                place: str | None = event.name
            elif event.name.startswith("_FusedHead"):
                place = "head"
            elif event.scope == _BACKWARD and event.sequence_nr in self._attention:
                place = _ATTENTION
            else:
                place = self._place(event.cpu_parent) if event.cpu_parent else None
            self._where[event.id] = place
        return self._where[event.id]


@contextmanager
def _marked_attention(name: str) -> Iterator[None]:
    """Every call of transformers' attention function ``name`` is a range of the profile."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise InputError(f"policy.attention {name!r} has no function of its own to be profiled.")
    function = ALL_ATTENTION_FUNCTIONS[name]

    # A compiled layer would leave the range out.
    @torch.compiler.disable
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_ATTENTION):
            return function(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, marked)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, function)


class Products:
    """The matrix products of a step's floor, by themselves: prompts once, no padding, no reference.

    Every weight of the decoder and the head is multiplied as in the step: forward, backward for
    the activations, and in full fine-tuning backward for the weight.
    """

    def __init__(self, setting: Setting, full: bool) -> None:
        rows, model = setting.batches[0], setting.load_model()
        responses = sum(len(response) for row in rows for response in row.responses)
        # The last token of a response predicts nothing: it needs no pass.
        N = sum(len(row.prompt) + sum(len(y) - 1 for y in row.responses) for row in rows)
        decoder: nn.Module = model.base_model
        layers = [m.weight.detach() for m in decoder.modules() if isinstance(m, nn.Linear)]
        head = model.get_output_embeddings().weight.detach()
        self.full = full
        self.parts: dict[str, tuple[list[Tensor], int, int]] = {
            "layers": (layers, N, N),
            "head": ([head], responses, _HEAD_ROWS),
        }
        sizes = {(w.shape[i], n) for ws, _, n in self.parts.values() for w in ws for i in (0, 1)}
        self.inputs = {
            (size, n): torch.randn(n, size, dtype=head.dtype, device=head.device)
            for size, n in sizes
        }

    def gflop(self, part: str) -> float:
        weights, N, _ = self.parts[part]
        return (6 if self.full else 4) * N * sum(w.numel() for w in weights) / 1e9

    @torch.no_grad()
    def run(self, part: str) -> None:
        weights, N, chunk = self.parts[part]
        for weight, start in itertools.product(weights, range(0, N, chunk)):
            n = min(chunk, N - start)
            x, g = self.inputs[weight.shape[1], chunk][:n], self.inputs[weight.shape[0], chunk][:n]
            F.linear(x, weight)
            g @ weight
            if self.full:
                g.T @ x


def profile(
    dtype: DtypeName, load: Load, adapter: str, reference: str, arguments: argparse.Namespace
) -> tuple[pd.DataFrame, pd.Series]:
    """Rates of the step and of its products alone; and the share of the step's time by kind."""
    setting = begin(arguments, dtype, [load])
    progress(f"profile, {dtype}, {adapter}: preparing")
    peer = checked(Entry("rotopo", adapter, reference), setting)
    assert isinstance(peer, Rotopo)
    products = Products(setting, adapter == FULL)
    (batch,) = peer.batches
    runs: dict[str, Callable[[], Any]] = {
        part: lambda part=part: products.run(part) for part in products.parts
    }
    runs["step"] = lambda: peer.step(batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    now = clock(arguments.device, arguments.threads)
    for turn in range(-arguments.warm_up, arguments.rounds):
        progress(f"profile, {dtype}, {adapter}: round {turn + 1} of {arguments.rounds}")
        for name, run in runs.items():
            began = now()
            run()
            if turn >= 0:
                seconds[name].append(now() - began)
    shares = profile_step(peer, batch)
    progress("")

    seconds = {
        "layers' products alone": seconds["layers"],
        "head's products alone": seconds["head"],
        "all products alone": [
            a + b for a, b in zip(seconds["layers"], seconds["head"], strict=True)
        ],
        "the step": seconds["step"],
    }
    layers, head = products.gflop("layers"), products.gflop("head")
    work = dict(zip(seconds, (layers, head, layers + head, layers + head), strict=True))
    rows = []
    for name, times in seconds.items():
        rates = [alone / t for alone, t in zip(seconds["all products alone"], times, strict=True)]
        low, median, high = statistics.quantiles(rates, n=4)
        whole = name == "the step"
        rows.append(
            {
                "": name,
                "GFLOP": work[name],
                "seconds": statistics.median(times),
                "GFLOP/s": work[name] / statistics.median(times),
                "share_of_rate": median if whole else None,
                "quartiles": f"{low:.2f} to {high:.2f}" if whole else "-",
            }
        )
    return pd.DataFrame(rows), pd.Series(shares)


def show_profile(
    dtype: DtypeName,
    load: Load,
    adapter: str,
    reference: str,
    arguments: argparse.Namespace,
    found: tuple[pd.DataFrame, pd.Series],
) -> None:
    print(
        f"\nprofile: rotopo, {arguments.model}, {dtype} on {arguments.device}, "
        f"{arguments.threads} thread(s), {adapter}, {reference} reference, {load.pairs} pairs a "
        f"step, context {load.context}, prompt ratio {load.prompt_ratio:g}, "
        f"{arguments.rounds} rounds"
    )
    rates, shares = found
    print(rates.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    print("Share of the step's time, as profiled:")
    print((100 * shares).to_string(float_format="{:5.1f} %".format), flush=True)
