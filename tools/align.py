"""The alignment report in one command: reward models, DPO and RoPO, generation, judges, one page.

Trains reward models on preference pairs and tests them beside an untrained one, tunes policies with
DPO (LoRA) and RoPO (DPO through a rotation), has them and the model they came from respond to
held-out prompts, and lets the reward models judge the responses. Run it again after it was
interrupted, and it goes on where it stopped.
"""

from rotopo import endings, progress, threads

if __name__ == "__main__":
    endings.begin()
    threads.begin()
    progress.begin()

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rotopo.data import films
from rotopo.data.batch import Role, collate
from rotopo.data.responses import Responses
from rotopo.data.rows import Rows
from rotopo.data.sources import load_rows
from rotopo.files import to_json, write_whole, writing_whole
from rotopo.judge.command import judge
from rotopo.lightning_cli import run as rotopo
from rotopo.metrics.displacement import at_equal_margin, log_ratios
from rotopo.metrics.embeddings import response_embeddings
from rotopo.metrics.runs import read_training
from rotopo.progress import Progress
from rotopo.report.command import report
from rotopo.run.continued import ContinuedRun, from_last_checkpoint, short_hash

CONFIGS = Path(__file__).parent.parent / "configs"
REWARD_MODEL = ["reward_model.yaml", "align.yaml"]
# The alignment report has two reward models that differ in their batch size; these are ours.
REWARD_MODELS: dict[str, list[str]] = {
    "trained": ["--trainer.max_epochs=1", "--data.pairs_per_step=16"],
    "trained_batch_2": [
        "--trainer.max_epochs=1",
        "--data.pairs_per_step=2",
        "--model.optimizer.lr=3.0e-4",
    ],
}
POLICIES: dict[str, list[str]] = {
    "DPO": ["adapters/lora.yaml", "align.yaml"],
    "RoPO": ["align.yaml"],
}
MAPPED = 150  # pairs on the map of embeddings
SOURCES = {
    "films": "critics' sentences about films, one from a review rated fresh and one from a review"
    " of the same film rated rotten; nobody compared the two, so that this is sentiment and no"
    " human preference",
    "qa": "answers to questions, which people have compared (Fine-Grained RLHF's QA feedback)",
}
ABOUT = (
    "SmolLM2-135M-Instruct, 135 million parameters, trained with adapters: LoRA for the reward"
    " models and DPO, a rotation for RoPO. The pairs: {source}. Every model trains on the same"
    " {pairs} of them, once, and everything else is measured on {held_out}.\n\n"
    "Two reward models judge, which differ in the pairs of a step, as in the alignment report, and"
    " in the learning rate: 16 and 1e-3 (trained), 2 and 3e-4 (trained_batch_2). They learnt from"
    " the pairs that the policies learnt from, and share their biases: a high win rate says that a"
    " policy has learnt what the judges learnt, not that people would prefer it."
)


class Workshop:
    """Runs of the command, each in a folder of its own that is named by all of its settings.

    A run that has finished is not done again, and a training goes on from its last checkpoint.
    """

    def __init__(self, output: Path, settings: list[str], own: list[str], long_texts: bool) -> None:
        self.output = output
        self.settings = settings
        self.own = own
        self.long_texts = long_texts
        # A file of pairs may change under its name.
        source = settings[0].partition("=")[2]
        files = [Path(source), Path(source.rpartition(":")[2])]
        self.stamp = [[f.stat().st_size, f.stat().st_mtime] for f in files if f.is_file()]
        self.began = time.perf_counter()

    def run(self, command: str, name: str, configs: list[str], *options: str) -> Path:
        """The folder ``version_N`` of a run."""
        files = [CONFIGS / file for file in ["quickstart.yaml", *configs]]
        arguments = [command, *(f"--config={file}" for file in files), *self.settings, *options]
        arguments += self.own  # last, so that they hold
        if self.long_texts:  # else the activations of a step take 10 GB and more
            model = "backbone" if "reward_model.yaml" in configs else "policy"
            arguments.append(f"--model.{model}.activation_checkpointing=true")
        place = self.output / "runs" / f"{name}-{command}"
        this = ContinuedRun.of(place, "done.json", arguments, files, self.stamp)
        folder = this.folder
        if this.is_done:
            print(f"{self.clock()}  {command} {name}: done before", flush=True)
            return folder / this.outcome()["run"]
        print(f"{self.clock()}  {command} {name} ...", flush=True)
        own_folder = f"--trainer.default_root_dir={folder}"
        cli = rotopo([*arguments, own_folder, *from_last_checkpoint(folder)])
        found = Path(cli.trainer.log_dir)
        if command == "fit":
            join_logs(sorted(folder.glob("version_*"), key=lambda f: int(f.name[8:])))
        del cli
        gc.collect()
        this.finish({"run": str(found.relative_to(folder))})
        return found

    def clock(self) -> str:
        minutes, seconds = divmod(int(time.perf_counter() - self.began), 60)
        return f"{minutes:3}:{seconds:02}"


def join_logs(versions: list[Path]) -> None:
    """Put what earlier parts of an interrupted training logged in front of the last part's log."""
    logs = [pd.read_csv(v / "metrics.csv") for v in versions if (v / "metrics.csv").exists()]
    for i in range(len(logs) - 1):
        logs[i] = logs[i][logs[i]["step"] < logs[i + 1]["step"].min()]
    pd.concat(logs).to_csv(versions[-1] / "metrics.csv", index=False)


def data_settings(source: str, pairs: int) -> tuple[list[str], bool]:
    """Settings of the datamodule for a source by its short name and about so many pairs of it, the
    source itself first; and whether no prompt is in two splits."""
    group: str | None = "film"
    if source == "films":
        source, settings = "python:rotopo.data.films.pairs", []
    else:
        settings = ["--data.max_length=512", "--data.on_bad_row=drop"]
        if source.startswith("qa:"):
            source = f"python:rotopo.data.qa_feedback.pairs:{source.removeprefix('qa:')}"
    rows = load_rows(source)
    if group not in rows.column_names:
        group = next((c for c in ("question", "prompt") if c in rows.column_names), None)
    test, validation = (max(1, min(pairs, most, len(rows) // 5)) for most in (320, 32))
    return [
        f"--data.source={source}",
        f"--data.group_by={group or 'null'}",
        f"--data.train_pairs={pairs}",
        f"--data.test={test / len(rows):.5f}",
        f"--data.validation={validation / len(rows):.5f}",
        *settings,
    ], group is not None


def embed(workshop: Workshop, file: Path, responses: dict[str, Path]) -> Path:
    """Embeddings of held-out pairs and of the policies' responses, by the model before training."""
    if file.exists():
        return file
    print(f"{workshop.clock()}  embedding the responses ...", flush=True)
    arguments = ["test", f"--config={CONFIGS / 'quickstart.yaml'}", *workshop.settings]
    folder = f"--trainer.default_root_dir={workshop.output / 'runs' / 'embedding'}"
    cli = rotopo([*arguments, folder, "--trainer.limit_test_batches=0"])
    data, policy = cli.datamodule, cli.model.policy
    rows = data.test_dataloader().dataset

    def batches(rows: Any, n: int) -> Any:
        chosen = np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int).tolist()
        for start in Progress(range(0, len(chosen), 16), "embedding"):
            part = [rows[i] for i in chosen[start : start + 16]]
            yield collate(part, data.pad_id, data.batching.layout, 1.0)

    points, labels = [], []
    with policy.reference_model() as model:
        x, roles = response_embeddings(model, batches(rows, MAPPED))
        points.append(x)
        labels += [Role(role).name.lower() for role in roles.tolist()]
        for name, path in responses.items():
            x, _ = response_embeddings(
                model, batches(Rows(Responses(str(path), data.encoder).tokens), MAPPED)
            )
            points.append(x)
            labels += [name] * len(x)
    with writing_whole(file) as stream:
        np.savez(stream, x=torch.cat(points).numpy(), labels=np.array(labels))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options that begin with --data. or --trainer. go to every run, on top of what it"
        " sets itself, e.g. --data.max_length=1024; see rotopo fit --help.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/align"), help="folder for it all")
    parser.add_argument(
        "--pairs", type=int, default=320, help="training pairs of each model (default: 320)"
    )
    parser.add_argument(
        "--data",
        default="films",
        help="films: critics' sentences, fresh against rotten (default); qa:FILE: human comparisons"
        " of answers, the feedback file of Fine-Grained RLHF; or a data set's name on the Hub, or a"
        " file, as data.source takes them",
    )
    arguments, options = parser.parse_known_args()
    others = [o for o in options if not o.startswith(("--data.", "--trainer."))]
    if others:
        parser.error(f"{others[0]}: only --data.NAME=VALUE and --trainer.NAME=VALUE go to all runs")
    if arguments.pairs < 16:
        parser.error("--pairs: at least 16 are needed for a single step of the reward model")
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    settings, grouped = data_settings(arguments.data, arguments.pairs)
    workshop = Workshop(output, settings, options, long_texts=arguments.data != "films")
    run = workshop.run

    print("Reward models")
    reward_training = {
        name: run("fit", name, REWARD_MODEL, *settings) for name, settings in REWARD_MODELS.items()
    }
    reward_tests = {"untrained": run("test", "untrained", REWARD_MODEL)}
    for name, folder in reward_training.items():
        reward_tests[name] = run("test", name, REWARD_MODEL, *from_last_checkpoint(folder))

    print("Policies")
    text = output / "plots.txt"
    if not text.exists():
        write_whole(text, films.plots(60))
    cached = "--model.policy.reference=cached"
    geometry = ["--trainer.callbacks+=rotopo.callbacks.Geometry"]
    geometry += ["--trainer.callbacks.pairs=4", "--trainer.callbacks.every_n_steps=10"]
    training = {
        name: run("fit", name, configs, cached, *geometry) for name, configs in POLICIES.items()
    }
    knowledge = ["--trainer.callbacks+=rotopo.callbacks.Perplexity"]
    knowledge += [f"--trainer.callbacks.file={text}"]
    tests = {
        name: run("test", name, POLICIES[name], cached, *knowledge, *from_last_checkpoint(folder))
        for name, folder in training.items()
    }

    print("Responses to held-out prompts, and their scores")
    sampling = "--model.sampling.max_new_tokens=96"
    predictions = {"base": run("predict", "base", POLICIES["DPO"], sampling)}
    for name, folder in training.items():
        predictions[name] = run(
            "predict", name, POLICIES[name], sampling, *from_last_checkpoint(folder)
        )
    responses = {name: folder / "responses.jsonl" for name, folder in predictions.items()}
    scores: dict[str, dict[str, Path]] = {}
    for name, file in responses.items():
        scores[name] = {}
        for judging, folder in reward_training.items():
            label, score = f"{name}-by-{judging}", f"--data.score={file}"
            scored = run("predict", label, REWARD_MODEL, score, *from_last_checkpoint(folder))
            scores[name][judging] = scored / "scores.jsonl"

    print("Judgement and report")
    perplexity = {name: folder / "perplexity.json" for name, folder in tests.items()}
    perplexity["base"] = output / "base_perplexity.json"
    write_reference_perplexity(perplexity["DPO"], perplexity["base"])
    judge(scores=scores, baseline="base", output=output / "judge", perplexity=perplexity)
    key = short_hash("".join(map(str, responses.values())))
    embeddings = embed(workshop, output / f"embeddings-{key}.npz", responses)
    page = output / "report.html"
    report(
        page,
        title="Alignment report",
        about=ABOUT.format(
            source=SOURCES.get(arguments.data.partition(":")[0], arguments.data),
            pairs=arguments.pairs,
            held_out="pairs and prompts that none of them has seen"
            if grouped
            else "pairs that none of them has seen, though perhaps on prompts that they have",
        ),
        reward_models=reward_tests,
        reward_training=reward_training,
        policies=training,
        policy_tests=tests,
        responses=responses,
        judge=output / "judge",
        embeddings=embeddings,
        published=True,
    )
    summary = summarise(reward_tests, tests, output / "judge" / "judge.json", training)
    write_whole(output / "summary.json", to_json(summary))
    print_summary(summary)
    print(f"\n{workshop.clock()}  The report is {page}, its figures {output / 'summary.json'}")


def write_reference_perplexity(tested: Path, base: Path) -> None:
    """The perplexity of the model before training, from where a policy was tested beside it."""
    found = json.loads(tested.read_text("utf-8"))
    prefix = "reference_"
    reference = {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)}
    write_whole(base, to_json(found | reference))


def summarise(
    reward_tests: dict[str, Path], tests: dict[str, Path], judged: Path, training: dict[str, Path]
) -> dict[str, Any]:
    """What summary.json holds."""
    figures = ("accuracy", "accuracy_interval", "reward_mean", "reward_std")

    def tested(folders: dict[str, Path]) -> dict[str, Any]:
        found = {n: json.loads((f / "test.json").read_text("utf-8")) for n, f in folders.items()}
        return {name: {k: test[k] for k in figures} for name, test in found.items()}

    policies = json.loads(judged.read_text("utf-8"))["policies"]
    runs = [read_training("policies", name, folder) for name, folder in training.items()]
    return {
        "reward_models": tested(reward_tests),
        "policies": {
            name: {
                judging: {k: verdict[k] for k in ("mean_score", "win_rate", "interval")}
                for judging, verdict in policy["judges"].items()
            }
            for name, policy in policies.items()
        },
        "implicit_rewards": tested(tests),
        "at_equal_margin": at_equal_margin({r.name: log_ratios(r, "train", 5) for r in runs}),
    }


def print_summary(summary: dict[str, Any]) -> None:
    print(f"\n{'reward model':18}{'accuracy':>10}{'95 % interval':>18}{'mean':>9}{'std':>8}")
    for name, found in summary["reward_models"].items():
        low, high = found["accuracy_interval"]
        print(
            f"{name:18}{found['accuracy']:10.3f}{f'{low:.3f} to {high:.3f}':>18}"
            f"{found['reward_mean']:9.3f}{found['reward_std']:8.3f}"
        )
    print(f"\n{'policy':10}{'judge':18}{'mean score':>10}{'win rate':>10}{'95 % interval':>18}")
    for name, judges in summary["policies"].items():
        for judging, found in judges.items():
            low, high = found["interval"]
            print(
                f"{name:10}{judging:18}{found['mean_score']:10.3f}{found['win_rate']:10.3f}"
                f"{f'{low:.3f} to {high:.3f}':>18}"
            )
    equal = summary["at_equal_margin"]
    if equal:
        print("\nAt an equal margin, in training: log-ratios to the reference in nats")
        for name, found in equal.items():
            print(
                f"{name:10}step {found['step']:.0f}, margin {found['margin']:.2f}: chosen "
                f"{found['chosen']:+.2f}, rejected {found['rejected']:+.2f}"
            )


if __name__ == "__main__":
    with endings.in_one_line(instead="before its end: the same command goes on where it stopped."):
        main()
