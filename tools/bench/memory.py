"""Memory of each rank under FSDP2, against the shares it ought to hold.

    python -m tools.bench.memory [--width 1024] [--layers 24] [--ranks 2] [--dtype float32]

Makes a Llama of random weights in bfloat16 with LoRA, loads it whole in one process and divided
among ranks, trains a few steps of DPO on processors over gloo, and prints for each rank what it
holds in memory of its own (not what it maps from the file), and the most it held while loading and
while training. What is predicted of the shares: a rank's part of the base, and of LoRA's weights,
gradients and moments. Beside these a rank needs the process itself, one or two decoder layers and
the embeddings while they are computed, and the activations.
"""

# Before torch: it sets what is read when torch starts.
from tools.bench.own_memory import MIB, Peak, llama, own_memory  # noqa: I001

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.models.policy import Policy
from rotopo.models.settings import DtypeName, PolicyConfig
from rotopo.models.sharding import Sharding
from rotopo.objectives import DPO


def measure(rank: int, ranks: int, model: str, dtype: DtypeName, store: str, results: str) -> None:
    """One rank's numbers, in MiB above the process before it loads anything."""
    torch.set_num_threads(1)
    sharding = None
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
        sharding = Sharding(init_device_mesh("cpu", (ranks,)))
    adapter = LoraConfig(r=16, target_modules="all-linear")
    config = PolicyConfig(path=model, dtype=dtype, adapter=adapter)
    torch.manual_seed(0)
    start = own_memory()
    with Peak() as loading:
        policy = Policy.load(config, True, sharding)
    loaded = own_memory()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    objective = DPO()
    ids = [7 + i % 200 for i in range(96)]
    row = TokenizedRow(ids[:32], [ids[32:64], ids[64:]], [Role.CHOSEN, Role.REJECTED], 0)
    batch = collate([row], 0, "packed", 1.0)
    with Peak() as training:
        for _ in range(3):
            objective.losses(policy(batch, Needs(reference=True))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    nbytes = [sum(p.numel() * p.element_size() for p in part) for part in (frozen, trained)]
    # Weights, gradients and two moments of what trains.
    shares = [nbytes[0] / ranks / MIB, (nbytes[0] + 4 * nbytes[1]) / ranks / MIB]
    found = [loaded, own_memory(), loading.most, training.most]
    numbers = [nbytes[0] / MIB, *shares, *(value - start for value in found)]
    Path(results, f"{ranks}-{rank}").write_text(" ".join(map(str, numbers)), "utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.memory",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the base, which is converted from the file's bfloat16 as it is loaded",
    )
    args = parser.parse_args()
    config = llama(args.width, args.layers, 8192)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        print(
            f"{'':>12}{'base':>8}{'its share':>11}{'loaded':>8}{'at most':>9}"
            f"{'with LoRA':>11}{'between':>9}{'at most':>9}"
        )
        for ranks in (1, args.ranks):
            torch.multiprocessing.spawn(
                measure, (ranks, folder, args.dtype, f"{folder}/store{ranks}", folder), ranks
            )
            for rank in range(ranks):
                numbers = Path(folder, f"{ranks}-{rank}").read_text("utf-8").split()
                base, share, both, loaded, after, most, peak = map(float, numbers)
                print(
                    f"rank {rank} of {ranks:<3}{base:8.0f}{share:11.0f}{loaded:8.0f}{most:9.0f}"
                    f"{both:11.0f}{after:9.0f}{peak:9.0f}"
                )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
