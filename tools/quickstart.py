"""Fit RoPO on critics' sentences about films, test before and after, compare, draw.

Usage: tools/quickstart [--output DIR] [rotopo options, e.g. --data.train_pairs 480]

configs/quickstart.yaml with fewer pairs, and without validation, of which the table has nothing.
"""

from rotopo import endings, progress, threads

if __name__ == "__main__":
    endings.begin()
    threads.begin()
    progress.begin()
    print("Starting; on two idle cores it takes some minutes in all.", flush=True)

import argparse
import io
import logging
import math
import sys
import textwrap
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rotopo.data import films
from rotopo.data.batch import collate_prompts
from rotopo.lightning_cli import RotopoCLI, built
from rotopo.models.policy import Sampling
from rotopo.progress import Progress
from rotopo.report import plots
from rotopo.run.whereabouts import Whereabouts

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
LESS = ("--data.train_pairs=160", "--data.validation=0", "--data.test=0.05")
# Both tests have the same reference; one of another run may differ from this one's by its rounding.
CACHED = "--model.policy.reference=cached"
JUDGED_PROMPTS = 32
PROMPTS_PER_BATCH = 16
SHOWN_PROMPTS = 1


class Quickstart(RotopoCLI):
    """A fit with the same test before and after it; what they print is in the run's folder."""

    before: dict[str, float]
    after: dict[str, float]
    seconds: float

    def carry_out(self, subcommand: str) -> None:
        # What a run says of itself is in the table below, or at its end.
        self.trainer.callbacks = [
            one for one in self.trainer.callbacks if not isinstance(one, Whereabouts)
        ]
        self.before = self.test("Test before training")
        start = time.perf_counter()
        print("Training", flush=True)
        super().carry_out(subcommand)
        self.seconds = time.perf_counter() - start
        self.after = self.test("Test after training")

    def test(self, title: str) -> dict[str, float]:
        print(title, flush=True)
        with redirect_stdout(io.StringIO()):
            self.trainer.test(self.model, self.datamodule, verbose=False)
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}


def lines(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 79, subsequent_indent=indent)


def interval(values: pd.Series) -> str:
    """Mean with the 95 % normal interval over independent values."""
    return f"{values.mean():+.3f} ± {1.96 * values.std() / math.sqrt(len(values)):.3f}"


def generate(cli: RotopoCLI, sampling: Sampling) -> pd.DataFrame:
    """Responses of the reference and of the policy to the first held-out prompts, by film."""
    data, policy = cli.datamodule, cli.model.policy
    rows = data.test_dataloader().dataset
    first = {tuple(rows[i].prompt): rows[i].row for i in reversed(range(len(rows)))}
    prompts = sorted(first, key=lambda prompt: first[prompt])[:JUDGED_PROMPTS]
    source = films.pairs()
    table = pd.DataFrame({"prompt": [source[first[prompt]]["prompt"] for prompt in prompts]})
    for name, reference in (("before", True), ("after", False)):
        responses = []
        starts = range(0, len(prompts), PROMPTS_PER_BATCH)
        for start in Progress(starts, f"Sentences {name} training"):
            part = [list(p) for p in prompts[start : start + PROMPTS_PER_BATCH]]
            batch = collate_prompts(part, data.pad_id, range(len(part)))
            responses += policy.generate(batch, sampling, data.stop_ids, reference)
        table[name] = [
            data.encoder.tokenizer.decode(r, skip_special_tokens=True) for r in responses
        ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/quickstart", help="folder for all results")
    arguments, options = parser.parse_known_args()
    output = Path(arguments.output)
    # What Lightning and the doctor say at the beginning of every run, where nothing is wrong.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"\n{lines(str(message))}\n"
    place = f"--trainer.default_root_dir={output}"
    with TemporaryDirectory() as cache:
        own = [*LESS, CACHED, f"--model.policy.reference_cache={cache}", place]
        cli = built(Quickstart, ["fit", f"--config={CONFIG}", *own, *options])
    before, after = cli.before, cli.after
    run = Path(cli.trainer.log_dir)
    log = pd.read_csv(run / "metrics.csv")

    responses = generate(cli, Sampling(max_new_tokens=32))
    analyser = SentimentIntensityAnalyzer()
    for name in ("before", "after"):
        scores = [analyser.polarity_scores(text)["compound"] for text in responses[name]]
        responses[f"vader_{name}"] = scores
    responses.to_json(output / "responses.jsonl", orient="records", lines=True)
    plots.implicit_rewards(run, output / "implicit_rewards.png")

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
    print(f"{'pairs per second':34}{rate:20.1f} ({cli.seconds:.0f} s with reference)")
    print(f"Accuracy with its 95 % interval: {accuracy:.3f} ± {spread:.3f}.")
    if before["test/rewards/accuracy"] == 0:
        print("Before training every margin is exactly 0: the accuracy is 0, the loss ln 2.")
    change = responses["vader_after"] - responses["vader_before"]
    print(f"Judge (VADER sentiment, -1 to 1; {len(responses)} prompts, greedy): before")
    scores = [interval(responses[f"vader_{name}"]) for name in ("before", "after")]
    print(f"{scores[0]}, after {scores[1]}, change {interval(change)}.")
    for _, row in responses.head(SHOWN_PROMPTS).iterrows():
        print("\n" + lines(row["prompt"]))
        for name in ("before", "after"):
            print(lines(f"  {name + ':':7} {row[name]}", " " * 10))
    print(f"\nIn {output}: implicit_rewards.png, responses.jsonl, {run.name}")
    print(f"As a model: tools/export --run {run} --output my_model")


if __name__ == "__main__":
    with endings.in_one_line(instead="before its end."):
        sys.exit(main())
