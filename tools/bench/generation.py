"""Time generation beside transformers' own, with adapters, one and several samples a prompt.

"plain" is model.generate of transformers on the model with its adapter: every response a copy of
its prompt, every copy in the batch until the last one ends. "ours" is rotopo's, in which equal
prompts are read once, what has ended leaves, and an adapter's layers are folded. Both respond at
temperature 1 to the same prompts, cut out of critics' sentences, turn and turn about, in one
process; a response ends with its first full stop (--stop), or at --new-tokens. On one thread the
time is that for which the processor ran the process.

Columns: tokens of responses a second, prompts' reading included (medians over the rounds), and
their ratio, by round, with its quartiles: above 1 ours is the faster one.

The defaults take some fifteen minutes on a slow core.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rotopo.data.batch import PromptBatch, collate_prompts
from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig, Sampling
from tools.bench.__main__ import SMOLLM2
from tools.bench.measure import clock, progress
from tools.bench.peers import ADAPTERS, LORA, ROTATION
from tools.bench.setting import RANDOM, SHAPES, Load, Setting, begin


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _arguments(args)
    rows = []
    print(f"{'dtype':9} {'adapter':9} {'samples':>7} {'plain':>8} {'ours':>8}  ratio (quartiles)")
    for dtype in arguments.dtype:
        load = Load(arguments.responses, arguments.prompt_tokens + 1, arguments.prompt_tokens)
        setting = begin(arguments, dtype, [load])
        for adapter in arguments.adapter:
            policy = Policy.build(
                setting.load_model("segments"),
                PolicyConfig(adapter=ADAPTERS[adapter]()),
                needs_reference=False,
            ).eval()
            for samples in arguments.samples:
                found = _compare(policy, setting, samples, arguments)
                rows.append({"dtype": dtype, "adapter": adapter, "samples": samples} | found)
                low, middle, high = found["ratio"]
                print(
                    f"{dtype:9} {adapter:9} {samples:7} {found['plain']:8.1f} {found['ours']:8.1f}"
                    f"  {middle:.2f} ({low:.2f} to {high:.2f})",
                    flush=True,
                )
    return rows


def _compare(policy: Policy, setting: Setting, samples: int, a: argparse.Namespace) -> dict:
    prompts = [row.prompt for row in setting.batches[0]][: max(1, a.responses // samples)]
    copies = [prompt for prompt in prompts for _ in range(samples)]
    batch = collate_prompts(copies, setting.pad_id, range(len(copies))).to(policy.device)
    stop_ids = setting.tokenizer(a.stop)["input_ids"][-1:]
    sampling = Sampling(a.new_tokens, temperature=1.0)
    ways: dict[str, Callable[[], int]] = {
        "plain": lambda: _plain(policy, batch, sampling, stop_ids, setting.pad_id),
        "ours": lambda: _ours(policy, batch, sampling, stop_ids),
    }
    now = clock(a.device, a.threads)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, a.rounds):  # the first turn warms up
        progress(f"{samples} samples: turn {turn + 1} of {a.rounds}")
        for name, generate in ways.items():
            began = now()
            tokens = generate()
            if turn >= 0:
                rates[name].append(tokens / (now() - began))
    progress("")
    ratios = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)]
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    return medians | {"ratio": statistics.quantiles(ratios, n=4)}


def _ours(policy: Policy, batch: PromptBatch, sampling: Sampling, stop_ids: list[int]) -> int:
    """As :func:`_plain`."""
    responses = policy.generate(batch, sampling, stop_ids)
    return sum(min(len(response) + 1, sampling.max_new_tokens) for response in responses)


@torch.no_grad()
def _plain(
    policy: Policy, batch: PromptBatch, sampling: Sampling, stop_ids: list[int], pad_id: int
) -> int:
    """Tokens of the responses, those that end them included."""
    model: Any = policy.language_model
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=0,
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
    )
    responses = output[:, batch.input_ids.shape[1] :].tolist()
    ends = [[token in stop_ids for token in response] for response in responses]
    return sum(end.index(True) + 1 if any(end) else len(end) for end in ends)


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    dtypes, shapes = ["bfloat16", "float32"], ", ".join(RANDOM + name for name in SHAPES)
    add("--dtype", nargs="+", choices=dtypes, default=dtypes, help="(default: both)")
    adapters = [LORA, ROTATION]
    add("--adapter", nargs="+", choices=ADAPTERS, default=adapters, help="(default: these two)")
    add("--samples", nargs="+", type=int, default=[1, 8], help="of a prompt (default: 1 8)")
    add("--responses", type=int, default=32, help="in a batch (default: %(default)s)")
    add("--prompt-tokens", type=int, default=96, help="about (default: %(default)s)")
    add("--new-tokens", type=int, default=32, help="at most (default: %(default)s)")
    add("--stop", default=".", help="what ends a response (default: a full stop)")
    add("--rounds", type=int, default=5, help="timed turns, two at least (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the processor (default: %(default)s)")
    add("--device", default="cpu", help="(default: cpu)")
    add("--model", default=SMOLLM2, help=f"a path, or {shapes} (default: SmolLM2-135M-Instruct)")
    arguments = parser.parse_args(args)
    if arguments.rounds < 2:
        parser.error("--rounds: at least 2")
    arguments.layout, arguments.policy = "padded", {}
    return arguments


if __name__ == "__main__":
    main()
