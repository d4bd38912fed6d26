"""Folders and files as runs, predictions and judgements leave them, of seeded numbers."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

WORDS = (  # noqa: SIM905
    "film story wit heart actor scene director camera script music summer comedy drama family "
    "ending laughter clever slow charming dull brilliant tired warm cold fresh stale moving "
    "portrait adventure thriller romance screenplay performance character audience picture"
).split()
# What a model writes, and what would break a page that trusts it.
AWKWARD = (
    "",
    '<script>document.title = "stolen"; console.error("ran")</script><img src=x onerror=alert(1)>',
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4,
    "🎬🍿 Ein großer Spaß 😀 — 電影很好看",
    "هذا الفيلم رائع جدا ويستحق المشاهدة",
    "</details></table></main>{{ 7 * 7 }} & \"quotes\" 'and' `ticks` \\u0000 %s",
)

SET = "data/preferences/2026/a_set_with_a_long_path/held_out.jsonl"


def save_test(
    folder: Path,
    seed: int,
    shift: float,
    scale: float,
    groups: bool = False,
    policy: bool = False,
    unit: str = "nats",
) -> Path:
    """A run of ``rotopo test`` on 300 pairs, whose chosen score higher by about ``shift``; of a
    policy with the yardstick, and of two sets."""
    numbers = np.random.default_rng(seed)
    texts = np.random.default_rng(7)  # the same pairs for every reward model
    pairs = []
    for row in range(300):
        lengths = texts.gamma(5, 7, 2).astype(int) + 2
        pair = {
            "row": 2 * row,
            "chosen_score": float(numbers.normal(shift, scale)),
            "rejected_score": float(numbers.normal(0, scale)),
            "chosen_tokens": int(lengths[0] * 1.2),
            "rejected_tokens": int(lengths[1]),
            "prompt": [{"role": "user", "content": f"Write a sentence on film {row}."}],
            "chosen": " ".join(texts.choice(WORDS, lengths[0])),
            "rejected": " ".join(texts.choice(WORDS[::-1][:30], lengths[1])),
        }
        if groups:
            pair["group"] = ("drama", "comedy", "a <b>genre</b> with quite a long name")[row % 3]
        pairs.append(pair)
    shown = (0, 60, 120, 179, 239, 299)  # those that a report takes for its samples
    for i, (row, awkward) in enumerate(zip(shown, AWKWARD, strict=True)):
        pairs[row]["chosen" if i % 2 else "rejected"] = awkward
    table = pd.DataFrame(pairs)
    margin = table.chosen_score - table.rejected_score
    rewards = np.concatenate([table.chosen_score, table.rejected_score])
    accuracy = float((margin > 0).mean())
    metrics = {
        "pairs": len(pairs),
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.05, accuracy + 0.05],
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(ddof=1)),
        "chosen_mean": float(table.chosen_score.mean()),
        "rejected_mean": float(table.rejected_score.mean()),
        "auroc": 0.7,
        "ece": 0.04,
        "length_correlation": None,
        "length_matched_accuracy": 0.61,
        "length_matched_pairs": 31,
        "groups": {
            name: {"pairs": len(own), "accuracy": float((margin[own.index] > 0).mean())}
            for name, own in (table.groupby("group") if groups else [])
        },
    }
    if policy:
        metrics["yardstick"] = _yardstick(shift, accuracy)
        metrics["sets"] = {
            name: {**metrics, "pairs": n, "groups": {}, "yardstick": _yardstick(own, accuracy)}
            for name, n, own in (("films", 200, shift), (SET, 100, shift / 2))
        }
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps(metrics), encoding="utf-8")
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (folder / "test_pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    if policy:
        return _settings(folder, "rotopo.objectives.DPO", "policy", unit)
    return _settings(folder, "rotopo.reward.RewardModule", "backbone", "")


def _yardstick(shift: float, accuracy: float) -> dict[str, Any]:
    return {
        "margin": 10 * shift,
        "margin_interval": [9 * shift, 11 * shift],
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.05, accuracy + 0.05],
        "log_ratio": {"chosen": -2 * shift, "rejected": -12 * shift},
        "log_ratio_per_token": {"chosen": -0.05 * shift, "rejected": -0.3 * shift},
        "displaced": 0.64,
        "kl_per_token": {"on_data": {"forward": 0.0123, "reverse": None}},
    }


def save_reward_fit(folder: Path, seed: int = 0) -> Path:
    numbers = np.random.default_rng(seed)
    steps = np.arange(80)
    table = pd.DataFrame({"epoch": 0, "step": steps, "lr-AdamW": 1e-4 * np.minimum(1, steps / 8)})
    table["train/loss"] = 0.69 - 0.2 * steps / 80 + numbers.normal(0, 0.06, 80)
    validation = pd.DataFrame({"epoch": 0, "step": [39, 79], "val/loss": [0.62, 0.55]})
    log = pd.concat([table, validation])
    return _fit(folder, log, "rotopo.reward.RewardModule", "backbone", "")


def save_policy_fit(
    folder: Path, seed: int, steps: int, fall: float, reference: bool = True
) -> Path:
    """A preference run: the margin grows to some 15 nats, and the chosen fall by ``fall``."""
    numbers = np.random.default_rng(seed)
    at = np.arange(steps)
    noise = numbers.normal(0, 0.6, (2, steps)) * np.minimum(1, at / 10)
    chosen = -fall * at / steps + noise[0]
    rejected = -(fall + 15) * at / steps + noise[1]
    table = pd.DataFrame({"epoch": 0, "step": at, "lr-AdamW": 5e-3 * (1 - at / steps)})
    table["train/loss"] = np.log1p(np.exp(-0.1 * (chosen - rejected)))
    validation = pd.DataFrame({"epoch": 0, "step": at[:: steps // 4][1:]})
    for stage, rows, up, down in (
        ("train", table, chosen, rejected),
        ("val", validation, chosen[:: steps // 4][1:] - 0.3, rejected[:: steps // 4][1:]),
    ):
        rows[f"{stage}/rewards/chosen"], rows[f"{stage}/rewards/rejected"] = 0.1 * up, 0.1 * down
        rows[f"{stage}/rewards/margin"] = 0.1 * (up - down)
        if reference:
            rows[f"{stage}/displacement/chosen_up"] = up
            rows[f"{stage}/displacement/rejected_down"] = -down
        rows[f"{stage}/rewards/accuracy"] = 0.75
    validation["val/loss"] = 0.6
    geometry = pd.DataFrame({"epoch": 0, "step": at[::10]})
    for layer in range(7):
        geometry[f"geometry/effective_rank/{layer:02d}"] = 120 - 9 * layer - 0.02 * fall * at[::10]
        geometry[f"geometry/distance/{layer:02d}"] = 0.03 * layer * at[::10] / steps * fall
    geometry["geometry/neuron_cosine"] = 0.031 + 1e-4 * fall * at[::10] / steps
    geometry["geometry/hyperspherical_energy"] = 1 + 1e-3 * fall * at[::10] / steps
    log = pd.concat([table, validation, geometry])
    unit = "nats" if reference else "nats per token"
    return _fit(folder, log, f"rotopo.objectives.{'DPO' if reference else 'SimPO'}", "policy", unit)


def save_responses(file: Path, seed: int, length: float, n: int = 48) -> Path:
    numbers = np.random.default_rng(seed)
    lines = []
    for row in range(n):
        tokens = min(64, int(numbers.gamma(6, length / 6)) + 1)
        text = " ".join(numbers.choice(WORDS, tokens))
        if row % 8 == seed % 8 and row // 8 < len(AWKWARD):
            text = AWKWARD[row // 8]
        prompt = [{"role": "user", "content": f"Write one sentence from a review of film {row}."}]
        lines.append({"row": 3 * row, "prompt": prompt, "response": text, "tokens": tokens})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def save_judgement(folder: Path, n: int = 48, level: float = 0.95) -> Path:
    """base, DPO and RoPO under two judges."""
    numbers = np.random.default_rng(3)
    shifts, judges = {"base": 0.0, "DPO": 0.8, "RoPO": 1.1}, {"trained": 1.0, "VADER": 0.3}
    ease = numbers.normal(0, 0.5, n)
    scores = {
        (policy, judge): scale * (ease + shift + numbers.normal(0, 1, n))
        for policy, shift in shifts.items()
        for judge, scale in judges.items()
    }
    policies: dict[str, Any] = {}
    for policy in shifts:
        found = {}
        for judge in judges:
            own = scores[policy, judge]
            difference = own - scores["base", judge]
            spread, rate = own.std() / n**0.5, float((difference > 0).mean())
            found[judge] = {
                "mean_score": own.mean(),
                "score_interval": [own.mean() - 2 * spread, own.mean() + 2 * spread],
                "mean_difference": difference.mean(),
                "difference_interval": [difference.mean() - spread, difference.mean() + spread],
                "win_rate": rate if policy != "base" else 0.5,
                "interval": [rate - 0.1, min(1.0, rate + 0.1)] if policy != "base" else [0.5, 0.5],
                "wins": int((difference > 0).sum()),
                "ties": int((difference == 0).sum()),
                "losses": int((difference < 0).sum()),
                "length_controlled_win_rate": rate,
                "length_controlled_interval": [rate - 0.2, min(1.0, rate + 0.2)],
            }
        texts = {"mean_tokens": 30.0, "distinct_1": 0.2, "distinct_2": 0.7, "self_bleu": 0.3}
        policies[policy] = {"judges": found, "texts": texts}
    policies["RoPO"]["texts"]["perplexity"] = 21.4
    result = {
        "baseline": "base",
        "prompts": n,
        "judges": list(judges),
        "level": level,
        "tie": 0.0,
        "resamples": 2000,
        "seed": 0,
        "policies": policies,
        "agreement": {"trained|VADER": {"kappa": 0.41, "agree": 0.72, "spearman": None}},
    }
    folder.mkdir(parents=True)
    (folder / "judge.json").write_text(json.dumps(result), encoding="utf-8")
    with (folder / "judge_scores.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["row", "policy", "judge", "score", "tokens"])
        for (policy, judge), values in scores.items():
            rows.writerows([3 * i, policy, judge, v, 20] for i, v in enumerate(values.tolist()))
    return folder


def save_embeddings(file: Path) -> Path:
    numbers = np.random.default_rng(5)
    labels = np.repeat(["chosen", "rejected", "base", "RoPO"], 40)
    centres = dict(zip(np.unique(labels), numbers.normal(0, 1, (4, 64)), strict=True))
    x = np.stack([numbers.normal(centres[label], 1.5) for label in labels])
    np.savez(file, x=x.astype(np.float32), labels=labels)
    return file


def everything(folder: Path) -> dict[str, Any]:
    """Arguments of :func:`rotopo.report.command.report` for a page with all of its parts."""
    return {
        "title": "Alignment report <of> films & critics",
        "about": "SmolLM2-135M-Instruct on critics' sentences.\n\nNot human preference.",
        "reward_models": {
            "untrained": save_test(folder / "untrained", 1, 0.1, 0.5),
            "trained": save_test(folder / "trained", 2, 1.4, 1.3, groups=True),
        },
        "reward_training": {"trained": save_reward_fit(folder / "reward")},
        "policies": {
            "DPO": save_policy_fit(folder / "dpo", 1, 80, 4.0),
            "RoPO": save_policy_fit(folder / "ropo", 2, 60, 2.0),
            "SimPO": save_policy_fit(folder / "simpo", 3, 40, 1.0, reference=False),
        },
        "policy_tests": {
            "DPO": save_test(folder / "dpo_test", 4, 0.6, 0.9, policy=True),
            "runs/a_long_path/to_a_run_of/SimPO": save_test(
                folder / "simpo_test", 5, 0.4, 0.9, policy=True, unit="nats per token"
            ),
        },
        "responses": {
            "base": save_responses(folder / "base.jsonl", 0, 40),
            "DPO": save_responses(folder / "dpo.jsonl", 1, 26),
            "RoPO": save_responses(folder / "ropo.jsonl", 2, 33),
        },
        "judge": save_judgement(folder / "judged"),
        "embeddings": save_embeddings(folder / "embeddings.npz"),
        "published": True,
    }


def _fit(folder: Path, metrics: pd.DataFrame, module: str, base: str, unit: str) -> Path:
    folder.mkdir(parents=True)
    metrics.to_csv(folder / "metrics.csv", index=False)
    return _settings(folder, module, base, unit)


def _settings(folder: Path, module: str, base: str, unit: str) -> Path:
    model = {"path": "SmolLM2-135M-Instruct", "adapter": {"class_path": "peft.LoraConfig"}}
    settings = {"seed_everything": 0, "model": {"class_path": module, "init_args": {base: model}}}
    facts: dict[str, Any] = {"base_fingerprint": "d20f91c2e654ac84", "reward_unit": unit}
    facts |= {"fingerprint": "8686562f16371ed0"}
    facts |= {"torch": "2.13.0+cpu", "peft": "0.21.2", "pairs/train": 480, "pairs/validation": 101}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(facts), encoding="utf-8")
    return folder
