"""Reward models through the command line: fit, resume, test, predict."""

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from rotopo.callbacks import Displacement, ImplicitRewards, PredictionWriter, Speed
from rotopo.cli import run
from rotopo.reward import RewardModule
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, Kill, Killed, assert_equal, last_checkpoint, weights

SCORE = "--data.score"


def save_reward_config(folder: Path, tokenizer) -> Path:
    """The small run, of a reward model."""
    file = save_config(folder, tokenizer)
    config = yaml.safe_load(file.read_text("utf-8"))
    init_args = config["model"]["init_args"]
    shared = {name: init_args[name] for name in ("optimizer", "scheduler")}
    config["model"] = {
        "class_path": "RewardModule",
        "init_args": {"backbone": init_args["policy"], "centering": 0.01, **shared},
    }
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_reward_config(tmp_path, tiny_tokenizer)


def command(name: str, config: Path, *options: str):
    return run([name, "--config", str(config), *options])


def add_column(config: Path, name: str, values) -> None:
    file = config.parent / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {name: value} for row, value in zip(rows, values, strict=False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_logs_the_contracts_names_and_is_tested_as_it_was_trained(config):
    cli = command("fit", config)
    classes = {type(callback) for callback in cli.trainer.callbacks}
    assert {ImplicitRewards, Speed, PredictionWriter} <= classes
    assert Displacement not in classes
    assert cli.datamodule.pairs.tokenizer_path == cli.model.backbone_config.path
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    names = ["loss", *(f"rewards/{n}" for n in ("chosen", "rejected", "margin", "accuracy", "sum"))]
    assert {f"{split}/{name}" for split in ("train", "val") for name in names} <= set(log)
    assert not [column for column in log if "logps" in column or "displacement" in column]
    assert len(log.dropna(subset=["train/loss"])) == 6

    (expected,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    chosen, rejected = [], []
    with torch.no_grad():
        for batch in cli.datamodule.test_dataloader():
            pairs = cli.model.eval().test_step(batch, 0)["pairs"]
            chosen += pairs.chosen.tolist()
            rejected += pairs.rejected.tolist()
    both = pd.DataFrame({"chosen": chosen, "rejected": rejected})
    margin = both["chosen"] - both["rejected"]
    by_hand = {"chosen": both["chosen"], "margin": margin, "accuracy": margin > 0}
    for name, values in by_hand.items():
        assert expected[f"test/rewards/{name}"] == pytest.approx(values.mean(), abs=1e-6)

    checkpoint = last_checkpoint_of(cli)
    for options in ([], ["--data.eval_pairs_per_batch=1"], ["--data.layout=padded"]):
        loaded = command("test", config, f"--ckpt_path={checkpoint}", *options)
        found = {name: float(value) for name, value in loaded.trainer.callback_metrics.items()}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def last_checkpoint_of(cli) -> Path:
    return max(Path(cli.trainer.log_dir).rglob("*.ckpt"), key=lambda f: f.stat().st_mtime)


def test_speed_counts_what_a_reward_model_computes(config):
    """Prompt and response are inputs to the last token, and the one behind it is not."""
    options = ["--trainer.max_epochs=1", "--data.pairs_per_step=24", "--data.validation=0.1"]
    cli = command("fit", config, *options)
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv").dropna(subset=["train/loss"])
    pairs = cli.datamodule.pairs.of["train"]
    assert len(pairs) == 24
    tokens = sum(len(ids) for name in ("prompt", "chosen", "rejected") for ids in pairs[name][:])
    assert log["speed/tokens_computed"].tolist() == [2 * tokens]
    assert log["speed/floor_share"].tolist() == [1.0]


def test_checkpoints_hold_adapter_and_head_and_nothing_else(config):
    cli = command("fit", config, *CHECKPOINTS)
    checkpoint = torch.load(last_checkpoint(config.parent / "runs"), weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names == set(weights(cli))
    assert sum(name.endswith("score.weight") for name in names) == 1
    assert all("lora_" in name or name.endswith("score.weight") for name in names)


@pytest.mark.parametrize(
    ("batch", "before"), [(3, True), pytest.param(7, False, marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_to_the_same_weights(config, monkeypatch, batch, before):
    def fit(root: str, *options: str):
        root = f"--trainer.default_root_dir={config.parent / root}"
        return command(
            "fit", config, root, *CHECKPOINTS, "--trainer.accumulate_grad_batches=2", *options
        )

    whole = fit("whole")
    assert whole.trainer.global_step == 6
    kill = Kill(batch, before)
    original = RewardModule.configure_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(RewardModule, "configure_callbacks", lambda self: [*original(self), kill])
        with pytest.raises(Killed):
            fit("killed")
    resumed = fit("killed", f"--ckpt_path={last_checkpoint(config.parent / 'killed')}")
    assert resumed.trainer.global_step == 6
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


def test_another_seed_is_no_other_base_model(config):
    checkpoint = last_checkpoint_of(command("fit", config))
    command("test", config, f"--ckpt_path={checkpoint}", "--seed_everything=7")


def test_given_responses_are_scored_as_in_the_test(config):
    cli = command("fit", config)
    expected = {}
    with torch.no_grad():
        for batch in cli.datamodule.test_dataloader():
            pairs = cli.model.eval().test_step(batch, 0)["pairs"]
            chosen, rejected = pairs.chosen, pairs.rejected
            both = torch.stack([chosen, rejected], 1).tolist()
            expected |= dict(zip(batch.rows.tolist(), both, strict=True))
    file = config.parent / "given.jsonl"
    lines = []
    for row in sorted(expected):
        preference = cli.datamodule.pairs.preference("test", row)
        for turns in (preference.chosen, preference.rejected):
            lines.append({"prompt": preference.prompt, "response": turns[0]["content"]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = f"--ckpt_path={last_checkpoint_of(cli)}"
    again = command("predict", config, checkpoint, f"{SCORE}={file}")
    scores = (Path(again.trainer.log_dir) / "scores.jsonl").read_text().splitlines()
    found = [json.loads(line)["score"] for line in scores]
    flat = [reward for row in sorted(expected) for reward in expected[row]]
    assert found == pytest.approx(flat, rel=1e-5, abs=1e-6)


def test_rotations_train_too(config):
    adapter = [
        "--model.backbone.adapter=rotopo.rotation.RotationConfig",
        "--model.backbone.adapter.target_modules=[q_proj,v_proj]",
    ]
    cli = command("fit", config, *adapter)
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    assert 0 < log["orthogonality/max"].dropna().iloc[-1] < 1e-6
    moved = [n for n, p in weights(cli).items() if "rotation_" in n and p.abs().sum() > 0]
    assert moved


def test_of_an_objective_only_what_all_modules_share_carries_over(tmp_path, tiny_tokenizer, capsys):
    dpo = save_config(tmp_path, tiny_tokenizer)
    with pytest.raises(SystemExit):
        run(["fit", f"--config={dpo}", "--model=RewardModule", "--model.l2=0.5", "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    before = yaml.safe_load(dpo.read_text())["model"]["init_args"]
    assert model["class_path"] == "rotopo.reward.RewardModule"
    optimizer = model["init_args"]["optimizer"]["init_args"]
    assert optimizer["lr"] == before["optimizer"]["init_args"]["lr"]
    assert model["init_args"]["l2"] == 0.5
    assert not {"policy", "beta", "sampling"} & model["init_args"].keys()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_margins_of_a_column_are_those_of_their_rows(config, layout):
    """Row i's margin is i: the loss of each pair says whose it was."""
    add_column(config, "margin", range(40))
    cli = command("test", config, "--data.margin=margin", f"--data.layout={layout}")
    with torch.no_grad():
        for batch in cli.datamodule.test_dataloader():
            pairs = cli.model.eval().test_step(batch, 0)["pairs"]
            chosen, rejected = pairs.chosen, pairs.rejected
            h = chosen - rejected - batch.rows
            expected = torch.log1p(torch.exp(-h)) + 0.01 * (chosen + rejected).square()
            torch.testing.assert_close(pairs.losses, expected)
            assert batch.margins.tolist() == batch.rows.tolist()


def test_bad_margins_are_named(config, message):
    assert "no column 'margin'" in message("--data.margin=margin")
    bad = [1.0] * 40
    bad[random.Random(0).randrange(40)] = None
    add_column(config, "margin", bad)
    error = message("--data.margin=margin", "--data.validation=0", "--data.test=0")
    assert f"row {bad.index(None)} (from 0): margin is None" in error


def test_margins_are_refused_where_nothing_takes_them(tmp_path, tiny_tokenizer, capsys):
    config = save_config(tmp_path, tiny_tokenizer)
    with pytest.raises(SystemExit):
        command("fit", config, "--data.margin=prompt")
    assert "data.margin: DPO takes no margins" in capsys.readouterr().err


def test_balanced_lengths_are_a_setting_of_training_pairs_only(config):
    plain = command("test", config)
    cli = command("test", config, "--data.balance_lengths=true")
    for name in ("validation", "test"):
        kept, all_ = (c.datamodule.pairs.of[name]["row"][:] for c in (cli, plain))
        assert kept == all_
    train = cli.datamodule.pairs.of["train"]
    chosen, rejected = (np.array([len(ids) for ids in train[n][:]]) for n in ("chosen", "rejected"))
    assert sum(chosen > rejected) == sum(chosen < rejected) > 0
    assert set(train["row"][:]) <= set(plain.datamodule.pairs.of["train"]["row"][:])
    assert cli.datamodule.pairs.fingerprint != plain.datamodule.pairs.fingerprint


def test_bad_input_is_named(config, message):
    assert "data.score" in message(command="predict")
    assert "centering is -1" in message("--model.centering=-1")
    assert "backbone.adapter" in message("--model.backbone.adapter.target_modules=[score]")
    file = config.parent / "unpaired.jsonl"
    rows = [{"prompt": f"{i}", "completion": "a film", "label": i % 2 == 0} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = message(f"--data.source={file}")
    assert "RewardModule compares two responses" in error
