"""Full fine-tuning computed in bfloat16, through the command line."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from rotopo.cli import run
from rotopo.export.command import export
from rotopo.run import checkpoints
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, Killed, fit, last_checkpoint, weights


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def half(config: Path, *settings: str, dtype: str = "compute_dtype: bfloat16") -> str:
    inside = ", ".join((f"path: {config.parent / 'model'}", "adapter: null", dtype, *settings))
    return f"--model.policy={{{inside}}}"


def test_step_0_is_exactly_0_and_small_steps_move_the_float32_weights(config):
    options = ["--model.optimizer.lr=1e-7", "--model.scheduler=null", "--trainer.max_steps=1"]
    cli = fit(config, "runs", half(config), *CHECKPOINTS, *options)
    (file,) = (config.parent / "runs").rglob("metrics.csv")
    log = pd.read_csv(file)
    assert log["train/rewards/margin"].dropna().iloc[0] == 0
    assert log["train/loss"].dropna().iloc[0] == pytest.approx(math.log(2), abs=1e-7)
    start = AutoModelForCausalLM.from_pretrained(config.parent / "model").state_dict()
    saved = checkpoints.read(last_checkpoint(config.parent / "runs"))
    for name, weight in weights(cli).items():
        before = start[name.removeprefix("policy.model.")]
        assert weight.dtype == torch.float32
        assert torch.equal(saved["state_dict"][name], weight)
        assert not torch.equal(weight, before)
        assert (weight - before).abs().max() < 2e-7  # which no bfloat16 weight would show
    moments = saved["optimizer_states"][0]["state"][0]
    assert moments["exp_avg"].dtype == torch.float32


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(config):
    options = [half(config), *CHECKPOINTS, "--trainer.accumulate_grad_batches=2"]
    whole = weights(fit(config, "whole", *options))
    with pytest.raises(Killed):
        fit(
            config,
            "killed",
            *options,
            "--trainer.callbacks+=tests.test_training.Kill",
            "--trainer.callbacks.batch=6",
            "--trainer.callbacks.before=true",
        )
    resume = f"--ckpt_path={last_checkpoint(config.parent / 'killed')}"
    found = weights(fit(config, "after", *options, resume))
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_a_checkpoint_is_tested_with_the_setting_and_without(config, tmp_path):
    fit(config, "runs", half(config), *CHECKPOINTS)
    checkpoint = f"--ckpt_path={last_checkpoint(config.parent / 'runs')}"
    found = []
    for root, dtype in (("half", "compute_dtype: bfloat16"), ("whole", "compute_dtype: null")):
        folder = f"--trainer.default_root_dir={config.parent / root}"
        run(["test", "--config", str(config), folder, half(config, dtype=dtype), checkpoint])
        (file,) = (config.parent / root).rglob("test.json")
        found.append(json.loads(file.read_text()))
    assert found[0]["reward_mean"] != found[1]["reward_mean"]
    assert found[0]["reward_mean"] == pytest.approx(found[1]["reward_mean"], rel=0.05)
    for name, dtype in (("wide", None), ("narrow", "bfloat16")):
        export(tmp_path / "runs" / "version_0", tmp_path / name, dtype=dtype)
    wide, narrow = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("wide", "narrow")
    )
    saved = checkpoints.read(last_checkpoint(config.parent / "runs"))["state_dict"]
    for name, weight in wide.items():
        assert torch.equal(weight, saved[f"policy.model.{name}"])
        assert torch.equal(weight.bfloat16(), narrow[name])


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--trainer.precision=bf16-mixed", "would both cast"),
        ("--model.policy.compute_dtype=float16", "bfloat16"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(config, capsys, option, named):
    with pytest.raises(SystemExit):
        fit(config, "runs", half(config), option)
    assert named in " ".join(capsys.readouterr().err.split())
