"""Training steps of rotopo and its peers, one at a time on the device: what parts measure."""

import gc
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel

from rotopo.callbacks.arithmetic import Decoder
from rotopo.callbacks.speed import count
from rotopo.data.batch import collate
from rotopo.models.settings import DtypeName
from tools.bench.peers import LORA, Entry, Peer, build
from tools.bench.setting import RANDOM, Load, Setting, begin
from tools.on_gpu.journal import NotHereError
from tools.on_gpu.part import Place, require

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A way to make a step.

    Attributes:
        entry: whose step it is, its adapter and its reference.
        policy: further settings of rotopo's policy.
        trl: further settings of TRL's DPOConfig.
        dtype: of the weights.
        needs: a package, ``GPU``, ``compiled`` (a part of the full run only), or a setting of the
            policy that not every version of rotopo has, as ``policy.NAME``.
    """

    entry: Entry
    policy: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)
    dtype: DtypeName = "bfloat16"
    needs: tuple[str, ...] = ()


def rotopo(*needs: str, adapter: str = LORA, reference: str = "online", **policy: Any) -> Row:
    """A row of ours, with settings of its policy."""
    return Row(Entry("rotopo", adapter, reference), policy, needs=needs)


def require_all(row: Row, place: Place) -> None:
    """Refuse what the machine cannot run, and compilations in the small run."""
    for need in row.needs:
        if need == "compiled":
            if place.tiny:
                raise NotHereError("compiling takes a minute: not in the small run")
        else:
            require(need, place)


def setting(row: Row, shape: str, load: Load, batches: int, place: Place) -> Setting:
    """What a row's step works on: a model of random weights and batches of random pairs."""
    arguments = SimpleNamespace(
        threads=torch.get_num_threads(),
        model=RANDOM + ("tiny" if place.tiny else shape),
        device=place.device,
        layout="packed",
        policy=row.policy,
    )
    return replace(begin(arguments, row.dtype, [load] * batches), trl=row.trl)  # type: ignore[arg-type]


def prepared(row: Row, here: Setting) -> Peer:
    """A peer, ready to step, in memory that no other holds any more."""
    gc.collect()
    if here.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()  # graphs of the row before
    return build(row.entry, here)


def timed(peer: Peer, batch: Any, device: str) -> float:
    """Seconds of a step."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    peer.step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def decoder_of(peer: Peer) -> Decoder:
    model: Any = peer.model
    return Decoder.of(model.get_base_model() if isinstance(model, PeftModel) else model)


@dataclass(frozen=True)
class Work:
    """What batches take, summed over them.

    Attributes:
        flops: that the model has to do: every prompt and response once, forward and backward, and
            forward for an online reference; whatever the peer lays out beside.
        least: token passes of the floor, without a reference.
        made: token passes that the peer makes, padding and repeated prompts included.
    """

    flops: float
    least: float
    made: float


def work(peer: Peer, row: Row, here: Setting) -> Work:
    decoder, online = decoder_of(peer), row.entry.reference == "online"
    flops = least = made = 0.0
    for rows, batch in zip(here.batches, peer.batches, strict=True):
        counts = count(collate(rows, 0, "packed", 1.0), decoder.windows).tolist()
        _, tokens, _, targets, *scores = counts
        flops += decoder.flops(tokens, targets, scores, online)
        least += tokens * (2 + decoder.trained)
        made += peer.tokens(batch) * decoder.passes(online)
    return Work(flops, least, made)


def memory(device: str) -> dict[str, float]:
    """GiB of the GPU since the peer was prepared; nothing on a processor."""
    if device != "cuda":
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }
