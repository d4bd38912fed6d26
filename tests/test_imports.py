"""Commands import no more than they use: each of these would wait seconds for what it does not."""

import subprocess
import sys

HEAVY = {"torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "matplotlib"}


def imported_by(program: str) -> set[str]:
    """Packages that a program of Python has imported when it ends."""
    told = "import sys, atexit\natexit.register(lambda: print('\\n', *sys.modules))\n"
    process = subprocess.run(
        [sys.executable, "-c", told + program], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return {name.partition(".")[0] for name in process.stdout.splitlines()[-1].split()}


def test_a_judge_of_files_needs_no_torch(tmp_path):
    """What it fits and compares is numpy's and scikit-learn's."""
    file = tmp_path / "scores.jsonl"
    line = '{"row": %d, "prompt": "?", "response": "well %d", "tokens": 2, "score": %d}\n'
    file.write_text("".join(line % (row, row, row % 3) for row in range(6)))
    options = [f"--scores.{name}={{judge: {file}}}" for name in ("base", "DPO")]
    options += ["--baseline=base", f"--output={tmp_path}", "--resamples=10"]
    found = imported_by(f"from rotopo.cli import main\nmain(['judge', *{options}])")
    assert (tmp_path / "judge.json").is_file()
    assert not found & HEAVY
