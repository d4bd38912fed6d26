"""The model card, and which checkpoint it is of."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rotopo.cli import run
from rotopo.export.command import export
from tests.export.runs import (
    Run,
    card,
    copied,
    fit,
    refused,
)
from tests.small_run import save_config


@pytest.mark.slow
def test_a_monitored_run_gives_its_best_checkpoint(tmp_path, tiny_tokenizer, capsys):
    monitor = "--trainer.callbacks.monitor=val/loss"
    one = fit(
        save_config(tmp_path, tiny_tokenizer),
        "--trainer.callbacks+=ModelCheckpoint",
        monitor,
        "--trainer.callbacks.mode=min",  # here the first epoch's: words drawn at random teach none
        "--trainer.callbacks.save_top_k=2",
        "--trainer.callbacks.save_last=true",
    )
    capsys.readouterr()
    export(one.folder, tmp_path / "best", form="adapter")
    assert "the best by val/loss" in capsys.readouterr().out
    assert "| steps | 3," in card(tmp_path / "best")
    (last,) = (one.folder / "checkpoints").glob("last.ckpt")
    export(one.folder, tmp_path / "last", checkpoint=last, form="adapter")
    assert "| steps | 6," in card(tmp_path / "last")
    log = pd.read_csv(one.folder / "metrics.csv")["val/loss"].dropna().tolist()
    for value, name in zip(log, ("best", "last"), strict=True):
        assert f"| validation | `loss` | {value:.4g} |" in card(tmp_path / name)
    one.close(PeftModel.from_pretrained(base_of(one), tmp_path / "last"))
    with pytest.raises(AssertionError):
        one.close(PeftModel.from_pretrained(base_of(one), tmp_path / "best"))


def base_of(one: Run):
    return AutoModelForCausalLM.from_pretrained(one.cli.model.policy_config.path)


def test_the_card_says_what_the_run_was_and_measured(lora, merged):
    text = card(merged)
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert not {"base_model", "license", "language"} & front.keys()  # of a folder; not known
    data, policy = lora.cli.datamodule, lora.cli.model.policy
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    every = sum(p.numel() for p in policy.parameters())
    log = pd.read_csv(lora.folder / "metrics.csv")
    for expected in (
        f"| parameters trained | {trained:,} of {every:,} ",
        f"| fingerprint of the training pairs | `{data.pairs.fingerprint}` |",
        "| optimiser | `torch.optim.AdamW`, learning rate `0.01` |",
        "| steps | 6, of `6` pairs each |",
        f"| times through the pairs | {36 / len(data.pairs.of['train']):.2f} |",
        "| seed | `1` |",
        f"| training | `loss` | {log['train/loss'].dropna().iloc[-1]:.4g} | 6 |",
        f"| validation | `loss` | {log['val/loss'].dropna().iloc[-1]:.4g} | 6 |",
        "beta: 0.3",
        "for 8 of 8 prompts and for 16 of 16 conversations",
    ):
        assert expected in text, expected
    assert "null" not in text.replace("that are not null", "")
    assert "Test of this checkpoint" not in text


def test_another_run_has_another_card(lora, exports, tmp_path):
    folder = copied(lora, tmp_path / "run")
    log = pd.read_csv(folder / "metrics.csv")
    log.loc[log["train/loss"].last_valid_index(), "train/loss"] = 12.345
    log.drop(columns=[c for c in log if c.startswith("val/")]).to_csv(folder / "metrics.csv")
    export(folder, tmp_path / "changed", form="adapter")
    text = card(tmp_path / "changed")
    assert "| training | `loss` | 12.35 | 6 |" in text
    assert "| validation | `" not in text
    text = card(exports["whole"][1])
    assert "none: full fine-tuning" in text
    assert "| steps | 3," in text
    assert "(100.000%)" in text


@pytest.mark.slow
def test_a_test_of_the_checkpoint_is_on_the_card_and_no_other(lora, tmp_path):
    config = lora.folder.parents[1] / "config.yaml"
    (checkpoint,) = (lora.folder / "checkpoints").iterdir()
    root = f"--trainer.default_root_dir={tmp_path / 'tests'}"
    tests = [
        Path(run(["test", f"--config={config}", root, *options]).trainer.log_dir)
        for options in ([f"--ckpt_path={checkpoint}"], [])
    ]
    found = json.loads((tests[0] / "test.json").read_text())
    export(lora.folder, tmp_path / "export", form="adapter", test=tests[0])
    assert f"| accuracy | {found['accuracy']:.4f} (95 % interval" in card(tmp_path / "export")
    assert "is no test of" in refused(lora.folder, tmp_path / "other", test=tests[1])
    # Beside the run it is found, although there is a later one of the untrained model.
    run_folder = copied(lora, tmp_path / "tests" / "run")
    settings = yaml.safe_load((tests[0] / "config.yaml").read_text())
    settings["ckpt_path"] = str(run_folder / "checkpoints" / checkpoint.name)
    (tests[0] / "config.yaml").write_text(yaml.safe_dump(settings))
    export(run_folder, tmp_path / "beside", form="adapter")
    assert f"| accuracy | {found['accuracy']:.4f} " in card(tmp_path / "beside")


def test_texts_of_a_run_are_texts_on_the_card(lora, tmp_path):
    evil = "a`b``` | <script>alert(1)</script> <img src=x> [x](http://x.y) **b**\n# c\n```\n<b>d"
    source = tmp_path / "<img src=y>`|_z_.jsonl"
    source.write_bytes((lora.folder.parents[1] / "pairs.jsonl").read_bytes())

    def change(config):
        config["data"]["init_args"]["source"] = str(source)
        config["data"]["init_args"]["score"] = evil
        config["seed_everything"] = 1

    folder = copied(lora, tmp_path / "run", change)
    facts = yaml.safe_load((folder / "hparams.yaml").read_text())
    (folder / "hparams.yaml").write_text(yaml.safe_dump(facts | {"torch": evil}))
    export(folder, tmp_path / "<b>`e`|f", form="adapter")
    text = card(tmp_path / "<b>`e`|f").split("---\n", 2)[2]
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert set(re.findall(r"<(\w+)", page)) <= {
        *("h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td")
    }
    export(lora.folder, tmp_path / "plain", form="adapter")
    text = card(tmp_path / "plain").split("---\n", 2)[2]
    plain = MarkdownIt("commonmark").enable("table").render(text)
    for tag in ("h1", "h2", "pre", "table", "tr", "td"):
        assert page.count(f"<{tag}>") == plain.count(f"<{tag}>"), tag
