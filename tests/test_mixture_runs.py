"""Mixtures and evaluation sets through the command line."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from rotopo.cli import run
from tests.small_run import save_config, save_pairs


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    return save_config(tmp_path, tiny_tokenizer)


def settings(config: Path, tmp_path: Path) -> dict:
    """Two sources, three to one, and two sets to validate on."""
    found = yaml.safe_load(config.read_text())
    data = found["data"]["init_args"]
    sets = {
        name: str(save_pairs(tmp_path / f"{name}.jsonl", n)) for name, n in (("a", 9), ("b", 7))
    }
    data["source"] = [
        {"source": data["source"], "weight": 3.0},
        {"source": str(save_pairs(tmp_path / "others.jsonl", 50)), "weight": 1.0},
    ]
    data |= {"validation": {"held_out": 0.2, **sets}, "test": 0.0, "pairs_per_step": 8}
    del found["data"]["init_args"]["test"]
    return found


def metrics(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv").filter(regex="^(train|val)/").dropna(how="all")


def leaves(found: Any, name: str = "") -> dict[str, float | None]:
    """The numbers in a JSON object, by their places in it."""
    if not isinstance(found, dict | list):
        return {name: found}
    inside = found.items() if isinstance(found, dict) else enumerate(found)
    return {k: v for key, one in inside for k, v in leaves(one, f"{name}/{key}").items()}


def test_a_mixture_goes_on_in_the_middle_and_sets_have_metrics(config, tmp_path):
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(settings(config, tmp_path)))
    keep = {
        "class_path": "ModelCheckpoint",
        "init_args": {
            "every_n_train_steps": 3,
            "save_top_k": -1,
            "monitor": "train/others/loss",  # a name that no validation has
        },
    }
    args = ["fit", "--config", str(file), "--trainer.max_steps=8", "--trainer.val_check_interval=5"]
    whole = run([*args, f"--trainer.callbacks={json.dumps([keep])}"])
    saved = next(Path(whole.trainer.checkpoint_callback.dirpath).glob("*step=3*"))
    again = run([*args, f"--ckpt_path={saved}"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name

    seen = metrics(Path(whole.trainer.logger.log_dir))
    for stage, names in (("train", ("pairs", "others")), ("val", ("held_out", "a", "b"))):
        for name in names:
            assert f"{stage}/{name}/rewards/accuracy" in seen, seen.columns

    def tested(sets: dict) -> tuple[dict, dict]:
        cli = run(["test", f"--ckpt_path={saved}", f"--data.test={json.dumps(sets)}"])
        logged = {k: float(v) for k, v in cli.trainer.logged_metrics.items()}
        return logged, json.loads((Path(cli.trainer.log_dir) / "test.json").read_text())

    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    both, written = tested({"a": a, "b": b})
    for name, source in (("a", a), ("b", b)):
        alone, own = tested({name: source})
        assert own["sets"][name] == {key: own[key] for key in own if key != "sets"}
        # Their batches are others, and KLs' sums are rounded.
        assert leaves(written["sets"][name]) == pytest.approx(leaves(own["sets"][name]), rel=1e-5)
        for key in ("loss", "rewards/margin", "displacement/chosen_up", "accuracy"):
            assert alone[f"test/{name}/{key}"] == alone[f"test/{key}"]
            assert both[f"test/{name}/{key}"] == pytest.approx(alone[f"test/{key}"], rel=1e-5)
    pairs = written["sets"]["a"]["pairs"], written["sets"]["b"]["pairs"]
    assert (*pairs, written["pairs"]) == (9, 7, 16)
