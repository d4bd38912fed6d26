"""Fit RoPO on critics' sentences about films, test before and after, compare, draw.

Usage: tools/quickstart [--output DIR] [rotopo options, e.g. --trainer.max_epochs 2]
"""

import argparse
import math
import sys
import time
from pathlib import Path

import pandas as pd
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rotopo.data import films
from rotopo.data.batch import collate_prompts
from rotopo.export.command import export
from rotopo.lightning_cli import run as rotopo
from rotopo.models.policy import Sampling
from rotopo.report import plots

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
JUDGED_PROMPTS = 48
SHOWN_PROMPTS = 3


def test_metrics(cli) -> dict[str, float]:
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def interval(values: pd.Series) -> str:
    """Mean with the 95 % normal interval over independent values."""
    return f"{values.mean():+.3f} ± {1.96 * values.std() / math.sqrt(len(values)):.3f}"


def generate(cli, sampling: Sampling) -> pd.DataFrame:
    """Responses of the reference and of the policy to the first held-out prompts, by film."""
    data, policy = cli.datamodule, cli.model.policy
    rows = data.test_dataloader().dataset
    first = {tuple(rows[i].prompt): rows[i].row for i in reversed(range(len(rows)))}
    prompts = sorted(first, key=lambda prompt: first[prompt])[:JUDGED_PROMPTS]
    source = films.pairs()
    table = pd.DataFrame({"prompt": [source[first[prompt]]["prompt"] for prompt in prompts]})
    for name, reference in (("before", True), ("after", False)):
        responses = []
        for start in range(0, len(prompts), 16):
            part = [list(p) for p in prompts[start : start + 16]]
            batch = collate_prompts(part, data.pad_id, range(len(part)))
            responses += policy.generate(batch, sampling, data.stop_ids, data.pad_id, reference)
        table[name] = [
            data.encoder.tokenizer.decode(r, skip_special_tokens=True) for r in responses
        ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/quickstart", help="folder for all results")
    arguments, options = parser.parse_known_args()
    output = Path(arguments.output)
    common = ["--config", str(CONFIG), "--trainer.default_root_dir", str(output), *options]

    print("1/4  Testing before training ...", flush=True)
    before = test_metrics(rotopo(["test", *common]))

    print("2/4  Training ...", flush=True)
    start = time.perf_counter()
    cli = rotopo(["fit", *common])
    seconds = time.perf_counter() - start
    run = Path(cli.trainer.log_dir)
    log = pd.read_csv(run / "metrics.csv")

    print("3/4  Testing after training ...", flush=True)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    after = test_metrics(cli)

    print("4/4  Generating before and after ...", flush=True)
    responses = generate(cli, Sampling(max_new_tokens=48))
    analyser = SentimentIntensityAnalyzer()
    for name in ("before", "after"):
        scores = [analyser.polarity_scores(text)["compound"] for text in responses[name]]
        responses[f"vader_{name}"] = scores
    responses.to_json(output / "responses.jsonl", orient="records", lines=True)
    export(run, run / "model", form="adapter" if cli.model.policy_config.adapter else "merged")
    plots.implicit_rewards(run / "metrics.csv", output / "implicit_rewards.png")

    held_out = len(cli.datamodule.test_dataloader().dataset)
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in cli.model.parameters())
    accuracy = after["test/rewards/accuracy"]
    spread = 1.96 * math.sqrt(accuracy * (1 - accuracy) / held_out)
    adapter = type(cli.model.policy_config.adapter).__name__
    print(f"\nDPO, {adapter}, SmolLM2-135M-Instruct; {held_out} held-out pairs of unseen films")
    print(f"{'':34}{'before':>10}{'after':>10}")
    for label, name in (
        ("loss (nats)", "loss"),
        ("chosen reward", "rewards/chosen"),
        ("rejected reward", "rewards/rejected"),
        ("margin", "rewards/margin"),
        ("accuracy (margin > 0)", "rewards/accuracy"),
    ):
        print(f"{label:34}{before[f'test/{name}']:10.3f}{after[f'test/{name}']:10.3f}")
    if "orthogonality/max" in after:  # other adapters than orthogonal ones have none
        errors = before["orthogonality/max"], after["orthogonality/max"]
        print(f"{'orthogonality error':34}{errors[0]:10.1e}{errors[1]:10.1e}")
    print(f"{'trainable parameters':34}{trained:>20,} ({share:.3%} of the model)")
    rate = log["speed/pairs_per_second"].mean()
    print(f"{'pairs per second':34}{rate:20.1f} ({seconds:.0f} s with loading and validation)")
    print(f"Accuracy with its 95 % interval: {accuracy:.3f} ± {spread:.3f}.")
    print("Before training every margin is exactly 0, so the accuracy is 0 and the loss ln 2.")
    change = responses["vader_after"] - responses["vader_before"]
    print(
        f"Judge (VADER sentiment, -1 to 1; {len(responses)} prompts, greedy): before "
        f"{interval(responses['vader_before'])}, after {interval(responses['vader_after'])}, "
        f"change {interval(change)}."
    )
    for _, row in responses.head(SHOWN_PROMPTS).iterrows():
        print(f"\n{row['prompt']}\n  before: {row['before']}\n  after:  {row['after']}")
    print(f"\nIn {output}: implicit_rewards.png, responses.jsonl; in {run}: the run, and model/")


if __name__ == "__main__":
    sys.exit(main())
