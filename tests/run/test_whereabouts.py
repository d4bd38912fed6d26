"""A fit says where it is, what trains, why it ended and what comes next."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from rotopo.cli import run
from tests.small_run import save_config

SHORT = ["--trainer.max_epochs=1", "--data.validation=0"]


@pytest.fixture
def config(tmp_path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


@pytest.mark.parametrize(
    ("options", "why", "next_line"),
    [
        (["--trainer.max_epochs=1"], "after step 3 (trainer.max_epochs 1 reached)", "Next: rotopo"),
        ([*SHORT, "--trainer.enable_checkpointing=false"], "after step 4", "No checkpoint was"),
        (
            # Within an epoch, and after its last validation.
            ["--trainer.max_steps=5", "--trainer.val_check_interval=2"],
            "after step 5 (trainer.max_steps 5 reached)",
            "Next: rotopo test --ckpt_path ",
        ),
        (
            [
                "--trainer.callbacks+=EarlyStopping",
                "--trainer.callbacks.monitor=val/logps/chosen",
                "--trainer.callbacks.stopping_threshold=9",
            ],
            "after step 3 (early stopping: val/logps/chosen is -5.",
            "Next: ",
        ),
        ([*SHORT, "--data.test=0"], "after step 6", "Next: rotopo export --run "),
        (["--trainer.max_time=00:00:00:00"], "0 (trainer.max_time reached)", "No checkpoint was"),
        (["--trainer.overfit_batches=1"], "reached; on overfit_batches 1 alone)", "Next: "),
    ],
)
def test_its_lines(config, capsys, options, why, next_line):
    capsys.readouterr()
    cli = run(["fit", f"--config={config}", *options])
    lines = capsys.readouterr().out.splitlines()
    folder = config.parent / "runs" / "version_0"
    # LoRA of rank 4 on two matrices of 32 × 32; two layers, and the embedding that is tied or not.
    every = sum(p.numel() for p in cli.model.parameters())
    what = f"DPO on model, 512 of {every:,} parameters ({512 / every:.3%}) train by LoraConfig."
    assert f"{folder}: {what}" in lines
    assert lines[-2].startswith(f"{folder}: ended ") or "nothing was left" in lines[-2]
    assert why in lines[-2]
    assert lines[-1].startswith(next_line)
    if "--ckpt_path" in lines[-1]:
        checkpoint = folder / "checkpoints" / "last.ckpt"
        assert lines[-1] == f"Next: rotopo test --ckpt_path {checkpoint}"
        assert [checkpoint] == list(checkpoint.parent.iterdir())


def test_a_run_that_was_over_says_so(config, capsys):
    options = [f"--config={config}", *SHORT]
    run(["fit", *options])
    run(["fit", *options, f"--ckpt_path={config.parent / 'runs/version_0/checkpoints/last.ckpt'}"])
    out = capsys.readouterr().out
    assert "version_1: nothing was left to train at step 4 (trainer.max_epochs 1 reached)." in out


def test_rates_are_logged_once_and_a_users_own_callbacks_stay(config):
    own = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=ModelCheckpoint"]
    own.append("--trainer.callbacks.filename=mine")
    for options in ([], own):
        run(["fit", f"--config={config}", *SHORT, *options])
    default, users = (
        pd.read_csv(config.parent / "runs" / f"version_{n}" / "metrics.csv") for n in range(2)
    )
    assert default["lr-AdamW"].notna().all()
    rates = users["lr-AdamW"].dropna()
    assert rates.tolist() == pytest.approx(default["lr-AdamW"].tolist(), rel=1e-6)
    assert len(users) == 2 * len(default)  # Lightning's callback has a line for each
    kept = config.parent / "runs" / "version_1" / "checkpoints"
    assert [file.name for file in kept.iterdir()] == ["mine.ckpt"]
    settings = yaml.safe_load((kept.parent / "config.yaml").read_text("utf-8"))
    assert len(settings["trainer"]["callbacks"]) == 2
