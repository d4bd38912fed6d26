"""rotopo plan's figures beside measured ones, on processors.

    python -m tools.bench.plan [--width 1024] [--layers 8] [--pairs 4] [--response 256]
                               [--tuned full lora rotation] [--ways single ddp fsdp2]

Makes a Llama of random weights in this process's memory, takes steps of DPO as Lightning does
(gradients go between the forward and the backward pass), alone or as two ranks over gloo, and
prints the most that each took of its own memory beyond what it held before it had a model, beside
the plan. What the plan does not know of: what the C library keeps of freed memory, and what the
matrix libraries pack their factors into.
"""

# Before torch: it sets what is read when torch starts.
from tools.bench.own_memory import MIB, Peak, llama, own_memory  # noqa: I001

import argparse
import copy
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig
from rotopo.models.sharding import Sharding
from rotopo.objectives import DPO
from rotopo.optimisers import groups_of, optimizer_of
from rotopo.plan.load import Load
from rotopo.plan.memory import Strategy, planner
from rotopo.rotation import RotationConfig

ADAPTERS: dict[str, Any] = {
    "full": None,
    "lora": LoraConfig(r=16, target_modules="all-linear"),
    "rotation": RotationConfig(),
}
RANKS = 2


def objective(tuned: str, checkpointing: bool) -> DPO:
    """What is trained; full fine-tuning in float32, adapters on bfloat16."""
    dtype: Any = "float32" if tuned == "full" else "bfloat16"
    settings = PolicyConfig(
        path="random",
        adapter=ADAPTERS[tuned],
        dtype=dtype,
        activation_checkpointing=checkpointing,
    )
    return DPO(policy=settings, optimizer=partial(torch.optim.AdamW, lr=1e-3))


def _policy(module: DPO, config: LlamaConfig, sharding: Sharding | None = None) -> Policy:
    settings = module.policy_config
    dtype = getattr(torch, settings.dtype)
    model = LlamaForCausalLM._from_config(
        config, dtype=dtype, attn_implementation=settings.attention
    )
    return Policy.build(model, settings, True, dtype, sharding)


def measure(
    rank: int,
    way: str,
    config: LlamaConfig,
    tuned: str,
    checkpointing: bool,
    load: Load,
    store: str,
    results: str,
) -> None:
    """The most MiB that a rank takes in a step, beside what it held before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sharding = None
    if way != "single":
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    if way == "fsdp2":
        sharding = Sharding(init_device_mesh("cpu", (RANKS,)))
    module = objective(tuned, checkpointing)
    small = copy.deepcopy(config)
    small.hidden_size, small.intermediate_size, small.num_hidden_layers = 128, 256, 1
    small.num_attention_heads = small.num_key_value_heads = 2
    _policy(objective(tuned, checkpointing), small)(
        load.batch(module.needs, 64)
    ).chosen.sum().backward()
    start = own_memory()  # with what the libraries keep, once they have worked
    module.policy = _policy(module, config, sharding)
    optimizer = optimizer_of(module.optimizer, groups_of(module.named_parameters()))
    step: Any = module
    step.forward = lambda batch: module._step(batch)["loss"]
    if way == "ddp":
        step = DistributedDataParallel(module)
    batch = load.batch(module.needs, config.vocab_size)
    for turn in range(3):
        with Peak() as peak:
            loss = step(batch)
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
        if turn == 0:
            continue  # the layout is checked, and the optimiser's state made
    Path(results, str(rank)).write_text(str(peak.most - start), "utf-8")
    if way != "single":
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.plan",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--tuned", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    ways = ["single", "ddp", "fsdp2"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    args = parser.parse_args()
    config = llama(args.width, args.layers, args.vocabulary)
    load = Load(args.pairs, args.prompt, args.response)
    print(f"{'MiB at most':<32}{'measured':>10}{'planned':>10}{'difference':>12}  when")
    for way in args.ways:
        for tuned in args.tuned:
            for checkpointing in (False, True):
                strategy = Strategy(way, 1 if way == "single" else RANKS)
                module = objective(tuned, checkpointing)
                with planner(
                    module, config, strategy, checkpointing=checkpointing, device="cpu"
                ) as memory:
                    planned = memory(load)
                with tempfile.TemporaryDirectory() as folder:
                    torch.multiprocessing.spawn(
                        measure,
                        (way, config, tuned, checkpointing, load, f"{folder}/store", folder),
                        strategy.ranks,
                    )
                    found = max(
                        float(Path(folder, str(rank)).read_text("utf-8"))
                        for rank in range(strategy.ranks)
                    )
                expected = planned.peak / MIB
                name = f"{way}, {tuned}" + ", checkpointed" * checkpointing
                print(
                    f"{name:<32}{found:>10.0f}{expected:>10.0f}{expected / found - 1:>12.1%}"
                    f"  {planned.moment}"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
