"""``python -m tests.golden.record FOLDER``: all golden runs, into a new folder.

Two such folders, of the code before and after a change, are compared by
``python -m tests.golden.compare OLD NEW``. In the folder there is also ``runs.json``, by which
``tests/golden/test_runs.py`` pins the runs on other machines: where a number is meant to move, the
file here is replaced by it.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.runs import INPUTS, RUNS, WEIGHTS, carry_out, save_inputs

_FIRST = 3  # entries of a weight that are written down


def main(arguments: list[str]) -> None:
    (folder,) = (Path(argument).absolute() for argument in arguments)
    folder.mkdir(parents=True)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"  # not the user's
    save_inputs(folder / INPUTS)
    seconds = {}
    for name in RUNS:
        seconds[name] = carry_out(name, folder)
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    write_summaries(folder / "runs.json", {name: summary(folder / name) for name in RUNS})
    print(f"{len(seconds)} runs in {folder}, {sum(seconds.values()):.0f} s")


def summary(run: Path) -> dict[str, Any]:
    """What is kept of a run's folder.

    ``metrics`` are the lines of each command's metrics.csv, without what is not measured there and
    without speeds. ``weights`` hold of each weight its shape, the sum and the norm of its entries
    w_i, i = 0, 1, ..., the sum of cos(i) w_i, which knows their order, and the first entries.
    """
    files = sorted(run.glob("*/version_0/metrics.csv"))
    return {
        "metrics": {
            file.parts[-3]: [
                {name: float(value) for name, value in line.items()} for line in metrics(file)
            ]
            for file in files
        },
        "weights": {
            name: _pinned(value) for name, value in sorted(load_file(run / WEIGHTS).items())
        },
    }


def metrics(file: Path) -> list[dict[str, str]]:
    """The lines of a metrics.csv as they are written, without empty values and speeds."""
    with file.open(encoding="utf-8", newline="") as opened:
        lines = list(csv.DictReader(opened))
    return [
        {
            name: value
            for name, value in sorted(line.items())
            if value and not name.startswith("speed/")
        }
        for line in lines
    ]


def _pinned(weight: Tensor) -> dict[str, Any]:
    entries = weight.double().flatten()
    places = torch.tensor([math.cos(i) for i in range(len(entries))], dtype=torch.float64)
    return {
        "shape": list(weight.shape),
        "sum": entries.sum().item(),
        "norm": entries.norm().item(),
        "cosine_sum": (places * entries).sum().item(),
        "first": entries[:_FIRST].tolist(),
    }


def write_summaries(file: Path, summaries: dict[str, Any]) -> None:
    """As JSON, a line for each line of metrics and each weight."""
    parts = []
    for name, found in summaries.items():
        commands = [
            f"{json.dumps(command)}: [\n{_lines(map(json.dumps, lines))}]"
            for command, lines in found["metrics"].items()
        ]
        weights = [f"{json.dumps(key)}: {json.dumps(w)}" for key, w in found["weights"].items()]
        parts.append(
            f'"{name}": {{"metrics": {{{", ".join(commands)}}},\n'
            f'"weights": {{\n{_lines(weights)}}}}}'
        )
    file.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def _lines(texts: Any) -> str:
    return ",\n".join(f"  {text}" for text in texts)


if __name__ == "__main__":
    main(sys.argv[1:])
