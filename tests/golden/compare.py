"""``python -m tests.golden.compare OLD NEW``: are two recordings of the golden runs the same?

Of one process every weight, metric and file has to be the same to the last bit, YAML by its
meaning; of two ranks weights and metrics to 1e-6. Speeds, logs for TensorBoard, checkpoints (whose
weights are compared) and caches are left out. Prints a line for each run, and what differs; the
exit status is 1 if anything does.
"""

import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.golden.record import metrics
from tests.golden.runs import RUNS, WEIGHTS

_TOLERANCE = 1e-6  # of ranks, relative
_ZERO = 1e-12  # what margins of zero are by rounding
_LEFT_OUT = ("*.ckpt", "events.out.*", WEIGHTS)
_CACHES = ("cache", "checkpoints")


def main(arguments: list[str]) -> int:
    old, new = map(Path, arguments)
    status = 0
    for name, golden in RUNS.items():
        found = differences(old / name, new / name, 0 if golden.ranks == 1 else _TOLERANCE)
        if found:
            status = 1
            print(f"{name}: {len(found)} differences", *found, sep="\n  ")
        else:
            print(f"{name}: {_described(old / name)}, the same")
    return status


def differences(old: Path, new: Path, tolerance: float) -> list[str]:
    """What differs between the folders of two recordings of a run.

    Args:
        old, new: the folders.
        tolerance: of weights and metrics, relative; 0 compares bits.
    """
    missing = [str(folder) for folder in (old, new) if not (folder / WEIGHTS).exists()]
    if missing:
        return [f"{folder} holds no run" for folder in missing]
    found = _of_weights(load_file(old / WEIGHTS), load_file(new / WEIGHTS), tolerance)
    before, after = files(old), files(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            found.append(f"{name} is only in {old if name in before else new}")
        elif name.endswith("metrics.csv"):
            found += _of_metrics(name, metrics(before[name]), metrics(after[name]), tolerance)
        elif name.endswith(".yaml"):
            one, other = (yaml.safe_load(f[name].read_text("utf-8")) for f in (before, after))
            found += _of_settings(name, one, other)
        elif before[name].read_bytes() != after[name].read_bytes():
            found.append(f"{name}: other content")
    return found


def files(run: Path) -> dict[str, Path]:
    """What is compared as files, by the path in the run's folder."""
    return {
        str(file.relative_to(run)): file
        for file in sorted(run.rglob("*"))
        if file.is_file()
        and not any(file.match(pattern) for pattern in _LEFT_OUT)
        and not set(file.relative_to(run).parts) & set(_CACHES)
    }


def _of_weights(
    old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], tolerance: float
) -> list[str]:
    found = [f"weight {name} is only in one" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        one, other = old[name], new[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            found.append(
                f"weight {name}: {one.dtype} {[*one.shape]}, {other.dtype} {[*other.shape]}"
            )
        elif not torch.equal(one, other):
            largest = (one - other).abs().max().item()
            if not largest <= tolerance * one.abs().max().item():
                found.append(f"weight {name}: differs by up to {largest}")
    return found


def _of_metrics(
    file: str, old: list[dict[str, str]], new: list[dict[str, str]], tolerance: float
) -> list[str]:
    if len(old) != len(new):
        return [f"{file}: {len(old)} and {len(new)} lines"]
    found = []
    for number, (one, other) in enumerate(zip(old, new, strict=True), 1):
        for name in sorted(one.keys() | other.keys()):
            a, b = one.get(name), other.get(name)
            if a == b:
                continue
            if a is None or b is None or not _near(float(a), float(b), tolerance):
                found.append(f"{file}, line {number}: {name} {a}, {b}")
    return found


def _near(a: float, b: float, tolerance: float) -> bool:
    return tolerance > 0 and abs(a - b) <= max(tolerance * max(abs(a), abs(b)), _ZERO)


def _of_settings(where: str, old: object, new: object) -> list[str]:
    """Where two parsed files differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{where}: {key} is only in one" for key in sorted(old.keys() ^ new.keys())]
        for key in sorted(old.keys() & new.keys()):
            found += _of_settings(f"{where}: {key}", old[key], new[key])
        return found
    return [] if old == new else [f"{where}: {old}, {new}"]


def _described(run: Path) -> str:
    lines = sum(len(metrics(file)) for file in run.rglob("metrics.csv"))
    weights = len(load_file(run / WEIGHTS))
    return f"{weights} weights, {lines} lines of metrics, {len(files(run))} files"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
