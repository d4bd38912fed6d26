"""What a run's folder gives to an export beside a checkpoint: metrics, and a test of it."""

from pathlib import Path
from typing import Any

from rotopo.errors import InputError
from rotopo.metrics.runs import Test, Training, read_test, read_training
from rotopo.run.kept import has, read_yaml


def check_pairs(file: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, as far as one can tell."""
    here = facts.get("fingerprint")
    there = next(
        (v["data_fingerprint"] for v in state.values() if has(v, "data_fingerprint")), here
    )
    if here is not None and there != here:
        raise InputError(
            f"checkpoint: {file} was trained on other pairs (fingerprint {there}) than the run "
            f"({here}): it belongs to another run."
        )


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
