"""How fast training goes, and how much of what it computes had to be computed."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rotopo.callbacks.arithmetic import Decoder, is_known, peak_flops
from rotopo.callbacks.measured import Measured
from rotopo.data.batch import PairBatch
from rotopo.run.steps import begins_step, ends_step

_STATUS = Path("/proc/self/status")  # Linux's


class Speed(Callback):
    """Logs of each optimiser step that is logged, over all ranks:

    - ``speed/pairs_per_second`` and ``speed/tokens_per_second``: from the beginning of the step's
      first micro-batch to the end of its last, on the slowest rank, without the wait for the
      first one's data; tokens without padding.
    - ``speed/tokens_computed``: tokens, padding included, times the passes that each takes through
      the decoder, in units of a forward pass: forward 1, backward 1 (2 where the model's own
      weights train, whose gradients are another product), activations computed again 1, and an
      online reference 1.
    - ``speed/tokens_avoided``: how many more the plain way would have computed, every response on
      a line of its own behind its prompt, as long as the micro-batch's longest, and the reference
      online if the objective has one.
    - ``speed/floor_share``: the least that any way has to compute, as a share of what was: every
      prompt once and every response once, forward and backward (2 passes, or 3 where the model's
      own weights train). 1 is a step without padding, repeated prompts, reference or
      recomputation. The last three are of models with linear layers.
    - ``speed/mfu``: floating-point operations per second as a share of the GPU's peak. Counted are
      the products of the decoder's linear layers, of the head and of the visible attention scores,
      of tokens that are no padding, and not what is computed again. Only on GPUs whose peak
      :mod:`rotopo.callbacks.arithmetic` knows, and of models all of whose products it counts.
    - ``speed/memory_gib``: on a GPU what the step allocated at its peak; on a CPU the most that
      the process has been resident with so far (Linux only). The largest of the ranks.

    The last token of a response is predicted and never an input, so no count of passes has it.
    What a model does not have is left out, which is said once.
    """

    metric_names = tuple(
        f"speed/{name}"
        for name in (
            *("pairs_per_second", "tokens_per_second", "tokens_computed", "tokens_avoided"),
            *("floor_share", "mfu", "memory_gib"),
        )
    )

    def __init__(self) -> None:
        self.decoder: Decoder | None = None
        self.peak: float | None = None
        self.measuring = False
        self.began = 0.0
        # Of the step so far; the second is on the device, since reading it waits for a GPU.
        self.laid_out: list[int] = []
        self.counts: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model, measured = pl_module.language_model, Measured()
        passes = "speed/tokens_computed, speed/tokens_avoided and speed/floor_share"
        self.decoder = measured(trainer, passes, lambda: Decoder.of(model))
        self.peak = measured(trainer, "speed/mfu", lambda: _peak(trainer, pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not begins_step(trainer, batch_idx):
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.measuring = every > 0 and (trainer.global_step + 1) % every == 0
        if self.measuring:
            self.laid_out, self.counts = [0, 0], []
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
                torch.cuda.reset_peak_memory_stats(pl_module.device)
            self.began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        if not self.measuring:
            return
        self.laid_out[0] += batch.n_pairs
        self.laid_out[1] += batch.input_ids.numel()
        self.counts.append(count(batch, self.decoder.windows if self.decoder else ()))
        if not ends_step(trainer, batch_idx):
            return
        self.measuring = False
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self.began
        memory = peak_memory(device)
        amounts = torch.tensor(self.laid_out, device=device)
        amounts = torch.cat([amounts, torch.stack(self.counts).sum(0)])
        most = torch.tensor([seconds, memory or 0.0], dtype=torch.float32, device=device)
        reduce = trainer.strategy.reduce
        pairs, laid_out, *counts = reduce(amounts, reduce_op="sum").tolist()
        seconds, largest = reduce(most, reduce_op="max").tolist()
        tokens, least, plain, targets, *scores = counts

        values = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
        if memory is not None:
            values["memory_gib"] = largest / 2**30
        decoder = self.decoder
        if decoder is not None:
            needs = getattr(pl_module, "needs", None)
            reference = needs is not None and needs.reference
            online = reference and pl_module.policy.cache is None
            computed = laid_out * decoder.passes(online)
            values |= {
                "tokens_computed": computed,
                "tokens_avoided": plain * decoder.passes(reference) - computed,
                "floor_share": least * (2 + decoder.trained) / computed,
            }
            if self.peak is not None:
                flops = decoder.flops(tokens, targets, scores, online)
                values["mfu"] = flops / (seconds * self.peak * trainer.world_size)
        for name, value in values.items():
            pl_module.log(f"speed/{name}", float(value), batch_size=1)


def _peak(trainer: Trainer, module: Any) -> float | None:
    """FLOP/s of the GPU at most; None where nobody knows.

    Raises:
        ValueError: it is known, but not how much the model computes.
    """
    model, device = module.language_model, module.device
    if device.type != "cuda":
        return None
    half = str(trainer.precision).startswith(("bf16", "16"))
    dtype = torch.bfloat16 if half else module.backbone.compute_dtype
    peak = peak_flops(torch.cuda.get_device_name(device), dtype)
    if peak is not None and not is_known(model):
        raise ValueError(f"not all that {type(model).__name__} computes is counted")
    return peak


def count(batch: PairBatch, windows: Iterable[int | None]) -> Tensor:
    """What a batch takes in any layout, on its device, without waiting for it.

    Args:
        batch: B rows of S responses.
        windows: numbers of positions that layers attend to; None for all.

    Returns:
        int64 [4 + windows]: tokens without padding; tokens with every prompt and response once;
        tokens of the plain layout, padding included; targets; and for each window the number of
        pairs of a query and a key that it sees.
    """
    segments, positions = batch.segment_ids.flatten(), batch.position_ids.flatten()
    prompt, real = segments == 0, segments >= 0
    # The prompts as they are laid out, one for each row or for each response: each begins at
    # position 0, and none is behind S of them.
    number = (prompt & (positions == 0)).cumsum(0) - 1
    lengths = torch.zeros_like(batch.lengths).index_add_(0, number, prompt.long())
    one_each = len(batch.segment_ids) == len(batch.lengths)
    of_response = lengths if one_each else lengths[batch.pairs]
    rows = torch.arange(batch.n_pairs, device=segments.device)
    first = torch.searchsorted(batch.pairs, rows)  # a row's responses lie together
    inputs = batch.lengths - 1  # the last token of a response is no input
    seen = positions + 1  # a token sees itself and all before it in its row
    visible = [seen if window is None else seen.clamp(max=window) for window in windows]
    return torch.stack(
        [
            real.sum(),
            of_response[first].sum() + inputs.sum(),
            len(inputs) * (of_response + inputs).max(),
            batch.lengths.sum(),
            *(torch.where(real, n, 0).sum() for n in visible),
        ]
    )


def peak_memory(device: torch.device) -> float | None:
    """Bytes at most since the peak was reset: allocated on a GPU, the process's on a CPU; None
    where nobody knows."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if device.type == "cpu" and _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return float(found[1]) * 1024 if found else None
    return None
