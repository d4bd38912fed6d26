"""SFT, then DPO from its adapter, on the command line: what starts from an adapter, or takes its
start out of the base, resumes and is exported like any other run."""

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from rotopo.cli import main
from rotopo.export.command import export
from rotopo.run import checkpoints
from tests.export.runs import ROTATION, fit, refused
from tests.small_run import save_config

NEW = "--model.policy.adapter={class_path: peft.LoraConfig, init_args: {r: 2}}"
OWN = "--model.policy={adapter: null}"
# With both forms of each; the last takes its start out of the base.
STARTS = {
    "goes on": [OWN],
    "under a new LoRA": [NEW],
    "under a rotation": [ROTATION],
    "pissa": ["--model.policy.adapter.init_lora_weights=pissa"],
    "olora, rank-stabilised": [
        "--model.policy.adapter.init_lora_weights=olora",
        "--model.policy.adapter.use_rslora=true",
    ],
}
KEPT = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=0",
    "--model.policy.adapter.lora_dropout=0",
]


pytestmark = pytest.mark.usefixtures("own_cache")


def first_loss(folder: Path) -> float:
    return float(pd.read_csv(folder / "metrics.csv")["train/loss"].dropna().iloc[0])


@pytest.mark.parametrize(
    "start",
    [n if n in ("goes on", "pissa") else pytest.param(n, marks=pytest.mark.slow) for n in STARTS],
)
def test_a_run_from_a_start_of_its_own_resumes_and_is_exported(tmp_path, tiny_tokenizer, start):
    config = save_config(tmp_path, tiny_tokenizer)
    options = [*KEPT, *STARTS[start]]
    if not start.endswith(("pissa", "stabilised")):
        sft = fit(config, "--model=SFT", *KEPT)
        export(sft.folder, tmp_path / "sft", form="adapter")
        options = [*KEPT[:-1], *STARTS[start], f"--model.policy.path={tmp_path / 'sft'}"]
    whole = fit(config, *options)
    assert first_loss(whole.folder) == pytest.approx(math.log(2), abs=1e-7)
    if start == "goes on":  # or from the run's folder itself
        other = fit(config, *options[:-1], f"--model.policy.path={sft.folder}")
        for a, b in zip(whole.trained(), other.trained(), strict=True):
            assert torch.equal(a, b)
        shutil.rmtree(sft.folder)  # by then it may have trained further: what it was is kept
        (last,) = other.folder.rglob("*step=3.ckpt")
        main(["test", f"--ckpt_path={last}"])
    (middle,) = whole.folder.rglob("*step=1.ckpt")
    resumed = fit(config, *options, f"--ckpt_path={middle}", "--seed_everything=5")
    ends = [
        checkpoints.read(one) for run in (whole, resumed) for one in run.folder.rglob("*=3.ckpt")
    ]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(ends[1]["state_dict"][name], value)

    export(resumed.folder, tmp_path / "merged")
    whole.close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    if start.startswith("under"):
        assert "export it as merged" in refused(resumed.folder, tmp_path / "no", form="adapter")
        return
    export(resumed.folder, tmp_path / "adapter", form="adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    whole.close(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    whole.close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    # Whose folder is a start in its turn.
    again = fit(config, *KEPT[:-1], OWN, f"--model.policy.path={tmp_path / 'adapter'}")
    assert first_loss(again.folder) == pytest.approx(math.log(2), abs=1e-7)
