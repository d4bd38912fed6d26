"""What a run prints of how far it is, and what it does not print."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from rotopo.callbacks import ProgressLine
from rotopo.callbacks.results import results_table
from rotopo.cli import run
from rotopo.data import token_cache
from rotopo.trainer import Trainer, shows_progress
from tests.small_run import save_config


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def test_the_log_of_a_fit_and_of_a_test(config, capfd, monkeypatch):
    tokenised = []
    monkeypatch.setattr(token_cache._Bar, "update", lambda self, n=1: tokenised.append(n))
    run(["fit", "--config", str(config), "--trainer.enable_progress_bar=true"])
    said = capfd.readouterr()
    assert sum(tokenised) == 40  # what datasets is at work on is shown in our way
    lines = [line for line in said.err.splitlines() if re.match("step|validation", line)]
    value = r"-?[\d.e+-]+"
    line = (
        rf"step {{}}/6  epoch {{}}/2  loss {value}  margin {value}  acc {value}  [\d.]+ pairs/s  "
    )
    assert [re.sub(r"  in .*|  0:.*", "", text)[:16] for text in lines] == [
        "step 1/6  epoch ",
        "validation, step",
        "validation, step",
        "step 6/6  epoch ",
    ]
    assert re.fullmatch(line.format(1, 1) + r"\d:\d\d left", lines[0])
    assert re.fullmatch(line.format(6, 2) + r"in \d:\d\d", lines[-1])
    assert "\r" not in said.out + said.err
    for advice in ("GPU available", "Tip:", "Loading `train", "Seed set", "Params", "gemm_4bit"):
        assert advice not in said.out + said.err

    run(["test", "--config", str(config)])
    said = capfd.readouterr()
    table, *_, rest = said.out.split("\n\n")
    assert max(map(len, [*table.splitlines(), *rest.splitlines()])) <= 80
    assert said.out.count("accuracy   ") == 1
    assert re.search(r"^loss, nats +0\.693$", said.out, re.M)


def test_a_bar_of_ones_own_wins_and_none_is_none():
    own = TQDMProgressBar()
    assert shows_progress([own], None) == []
    assert shows_progress([], False) == []
    for settings, kind in (({}, ProgressLine), ({"callbacks": [own]}, TQDMProgressBar)):
        trainer = Trainer(accelerator="cpu", logger=False, **settings)
        assert type(trainer.progress_bar_callback) is kind
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    assert trainer.progress_bar_callback is None


def test_a_table_of_several_sets_and_of_metrics_of_ones_own():
    found = {
        "val/loss": torch.tensor(0.693147),
        "val/helpful/rewards/margin": 0.00012345,
        "val/mine": 12345.678,
        f"val/{'long' * 30}": 1.0,
        "val/told": 1.0,
    }
    table = results_table("val", [found], aside={"val/told"}).splitlines()
    assert [line.split() for line in table[:3]] == [
        ["loss,", "nats", "0.693"],
        ["helpful:", "margin", "of", "the", "rewards", "1.23e-04"],
        ["mine", "1.23e+04"],
    ]
    assert len(table) == 4
    assert {len(line) for line in table} == {72}
