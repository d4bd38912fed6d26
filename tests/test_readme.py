"""The README's worked example of a new objective, run as it stands there."""

import inspect
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from rotopo.cli import run
from tests.small_run import save_config

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def example(tmp_path, monkeypatch) -> Path:
    section = README.read_text("utf-8").partition("## A new objective\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL)
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


def test_its_class_has_at_most_15_lines(example):
    from square_hinge import SquareHinge  # type: ignore[import-not-found]

    assert len(inspect.getsource(SquareHinge).strip().splitlines()) <= 15
