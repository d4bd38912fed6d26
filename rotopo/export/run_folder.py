"""What a run's folder gives to an export: a checkpoint, settings, metrics, and a test of it."""

from pathlib import Path
from typing import Any

import yaml

from rotopo.errors import InputError
from rotopo.metrics.runs import Test, Training, read_test, read_training
from rotopo.run.checkpoints import check


def choose_checkpoint(run: Path, given: Path | None) -> tuple[Path, str]:
    """The checkpoint to export, and which one that is, in words."""
    if given is not None:
        return given, "as asked for"
    # A slash in a checkpoint's name has made folders.
    files = sorted((run / "checkpoints").rglob("*.ckpt"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise InputError(
            f"run: there is no checkpoint in {run / 'checkpoints'}: name one in checkpoint, or let "
            "the run go on until it has written one."
        )
    last = [file for file in files if file.name.startswith("last")] or files
    for callback in check(last[-1]).get("callbacks", {}).values():
        if callback.get("monitor") and callback.get("best_model_path"):
            path = Path(callback["best_model_path"])
            kept = Path(callback.get("dirpath") or path.parent)
            name = path.relative_to(kept) if path.is_relative_to(kept) else path.name
            best = run / "checkpoints" / name
            if not best.exists():
                raise InputError(
                    f"run: the checkpoint with the best {callback['monitor']}, {best}, is gone: "
                    "name another one in checkpoint."
                )
            score = float(callback["best_model_score"])
            return best, f"the best by {callback['monitor']} ({score:.4g})"
    return last[-1], "the last"


def check_pairs(file: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, as far as one can tell."""
    here = facts.get("fingerprint")
    there = next(
        (v["data_fingerprint"] for v in state.values() if _has(v, "data_fingerprint")), here
    )
    if here is not None and there != here:
        raise InputError(
            f"checkpoint: {file} was trained on other pairs (fingerprint {there}) than the run "
            f"({here}): it belongs to another run."
        )


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings of a file; empty where there is none."""
    if not file.exists():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {error}") from error


def read_metrics(run: Path) -> Training | None:
    """What the run logged, if it logged a table."""
    return read_training("run", run.name, run) if (run / "metrics.csv").is_file() else None


def find_test(run: Path, checkpoint: Path, given: Path | None) -> Test | None:
    """The test of a checkpoint: the one that was named, or one beside the run. A run that went on
    may have written another checkpoint under the name since."""

    def of_the_checkpoint(folder: Path) -> bool:
        try:
            settings: Any = read_yaml(folder / "config.yaml")
            tested, since = Path(settings["ckpt_path"]), (folder / "test.json").stat().st_mtime
        except (InputError, OSError, KeyError, TypeError):  # whatever lies there
            return False
        return tested.resolve() == checkpoint.resolve() and checkpoint.stat().st_mtime <= since

    if given is not None:
        if not of_the_checkpoint(given):
            raise InputError(f"test: {given} is no test of {checkpoint}: name its own, or none.")
        return read_test("test", given.name, given)
    beside = sorted(file.parent for file in run.parent.glob("*/test.json"))
    found = [folder for folder in beside if of_the_checkpoint(folder)]
    return read_test("test", found[-1].name, found[-1]) if found else None
