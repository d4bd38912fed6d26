"""Time a round's scoring in ROPO's procedure beside a reference pass over the same pairs.

Scoring is what rotopo.robust.Alternation does between rounds: every pair through the policy, with
the reference's log-probs cached, its loss and margin gathered. A reference pass is what
policy.reference: cached does before the first step: every pair through the model with its adapter
off, the log-probs kept and written. Both go over the same batches, turn and turn about, in one
process; printed is the ratio of their times, by round. On one thread the time is that for which
the processor ran the process.

The defaults take some three minutes on a slow core.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from rotopo.lightning_cli import run
from rotopo.robust.scoring import score
from tools.bench.measure import clock

CONFIGS = Path(__file__).parents[2] / "configs"
ADAPTERS = {
    "lora": ["quickstart.yaml", "objectives/ropo.yaml", "adapters/lora.yaml"],
    "rotation": ["quickstart.yaml", "objectives/ropo.yaml"],
}


class Timing(Callback):
    """Scores and passes, timed before the first step."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.seconds: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        data, policy = trainer.datamodule, pl_module.policy
        now = clock(trainer.strategy.root_device.type, torch.get_num_threads())
        rows, cache = data.rows("train"), policy.cache
        for turn in range(-1, self.rounds):  # the first turn warms up
            with tempfile.TemporaryDirectory() as folder:
                policy.open_cache(folder)
                began = now()
                policy.cache_reference(data.batches(rows, range(len(rows))))
                passed = now() - began
            policy.cache = cache
            began = now()
            score(trainer, rows, "Scoring")
            if turn >= 0:
                self.seconds.append((now() - began, passed))


def main(args: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.scoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further options go to rotopo fit, e.g. --data.source=FILE.",
    )
    add = parser.add_argument
    add("--adapter", choices=ADAPTERS, default="lora", help="(default: lora)")
    add("--pairs", type=int, default=96, help="how many are scored (default: %(default)s)")
    add("--rounds", type=int, default=7, help="timed turns, two at least (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the processor (default: %(default)s)")
    arguments, options = parser.parse_known_args(args)
    if arguments.rounds < 2:
        parser.error("--rounds: at least 2")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        cli = run(
            [
                "fit",
                *(f"--config={CONFIGS / name}" for name in ADAPTERS[arguments.adapter]),
                "--model.policy.reference=cached",
                f"--data.train_pairs={arguments.pairs}",
                f"--trainer.default_root_dir={folder}",
                "--trainer.max_steps=1",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                *options,
                # By a name that can be imported, whoever runs this.
                "--trainer.callbacks+=tools.bench.scoring.Timing",
                f"--trainer.callbacks.rounds={arguments.rounds}",
            ]
        )
    timing: Any = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Timing")
    ratios = [scoring / passed for scoring, passed in timing.seconds]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"Scoring {arguments.pairs} pairs takes {median:.3f} times a reference pass over them "
        f"(quartiles {low:.3f} to {high:.3f}, {arguments.rounds} rounds, {arguments.adapter}, "
        f"{arguments.threads} thread(s))"
    )
    return ratios


if __name__ == "__main__":
    main()
