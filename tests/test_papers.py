"""The papers' files run, in small: a tiny model, a few rows, one processor."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from rotopo.cli import run
from tests.small_run import save_model

PAPERS = sorted((Path(__file__).parents[1] / "configs" / "papers").glob("*.yaml"))
# Those with mixtures, formats or schedules of their own.
RECIPES = ("smollm3_3b_apo", "tulu3_8b_dpo_norm", "olmo3_7b_instruct_dpo_norm", "zephyr_7b_sft")


def rows_of(row_format: str | None, n: int) -> list[dict[str, Any]]:
    """Rows in a papers' format, of few words."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt = {"role": "user", "content": f"q {i}"}
        good = {"role": "assistant", "content": f"good {i}"}
        bad = {"role": "assistant", "content": f"bad {i}"}
        beside = {
            "messages": {"messages": [prompt, good]},
            "explicit": {"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
            "align_anything": {
                "question": f"q {i}",
                "response_1": f"bad {i}",
                "response_2": f"good {i}",
                "overall_response": 2,
            },
        }
        pair = {"prompt": f"q {i}"} if row_format == "ultrafeedback" else {}
        pair |= {"chosen": [prompt, good], "rejected": [prompt, bad]}
        rows.append(beside.get(row_format or "", pair))
    return rows


def in_small(file: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A paper's settings, but for the model's size, the rows, the machine, and how many they are
    together in a step."""
    config = yaml.safe_load(file.read_text("utf-8"))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    trainer = config["trainer"]
    policy = model.get("policy") or model["backbone"]
    policy |= {"path": str(save_model(folder / "model", tokenizer)), "dtype": "float32"}
    policy.pop("compute_dtype", None)
    model.get("policy", {}).pop("reference", None)
    model["optimizer"]["init_args"]["lr"] = 0.01

    def stored(name: str) -> str:
        rows = folder / f"{name}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows_of(data["format"], 24))
        rows.write_text(
            text.replace("good", f"{name} good").replace("bad", f"{name} bad"), encoding="utf-8"
        )
        return str(rows)

    if isinstance(data["source"], list):
        for one in data["source"]:
            one["source"] = stored(one["name"])
            one.pop("split", None)
            if "rows" in one:
                one["rows"] = max(1, one["rows"] // 10_000)  # two of them are most of it
    else:
        data["source"] = stored("rows")
    data |= {"train_split": "train", "validation": 0.25 if data["validation"] else 0.0}
    data |= {"pairs_per_step": 4, "pad_token": None, "max_length": 512}
    data |= {"cache_dir": str(folder / "cache"), "doctor": False}
    trainer |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer |= {"accumulate_grad_batches": 2, "default_root_dir": str(folder / "runs")}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer |= {"log_every_n_steps": 1, "callbacks": trainer["callbacks"][1:]}
    return config


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=[] if file.stem in RECIPES else pytest.mark.slow, id=file.stem)
        for file in PAPERS
    ],
)
def test_a_papers_file_runs_in_small_and_learns(file, tmp_path, tiny_tokenizer):
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(in_small(file, tmp_path, tiny_tokenizer)), encoding="utf-8")
    run(["fit", "--config", str(small)])
    (file_of_log,) = (tmp_path / "runs").rglob("metrics.csv")
    log = pd.read_csv(file_of_log)
    losses = log["train/loss"].dropna()
    assert len(losses) >= 4
    assert losses.iloc[-1] < losses.iloc[0]
    mixed = [len(log.filter(like=f"train/{name}/").columns) for name in names_in(file)]
    assert all(mixed)


def names_in(file: Path) -> list[str]:
    source = yaml.safe_load(file.read_text("utf-8"))["data"]["init_args"]["source"]
    return [one["name"] for one in source] if isinstance(source, list) else []
