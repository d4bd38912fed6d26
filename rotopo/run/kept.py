"""A run's checkpoints, where its folder is all that is named: the best or the last of them."""

from pathlib import Path
from typing import Any

import yaml

from rotopo.errors import InputError
from rotopo.run.checkpoints import check


def choose_checkpoint(run: Path, given: Path | None) -> tuple[Path, str]:
    """The checkpoint to export, and which one that is, in words."""
    if given is not None:
        return given, "as asked for"
    places = _places(run)
    found = _files(places)
    files = [file for file in found if found[file] == places[0] or _is_of(run, file)]
    files.sort(key=lambda file: file.stat().st_mtime)
    if not files:
        others = f", and what lies in {', '.join(map(str, places[1:]))} is no checkpoint of it"
        raise InputError(
            f"run: there is no checkpoint in {places[0]}{others if places[1:] else ''}: name one "
            "in checkpoint, or let the run go on until it has written one."
        )
    last = [file for file in files if file.name.startswith("last")] or files
    for callback in check(last[-1]).get("callbacks", {}).values():
        if callback.get("monitor") and callback.get("best_model_path"):
            path = Path(callback["best_model_path"])
            kept = Path(callback.get("dirpath") or path.parent)
            name = path.relative_to(kept) if path.is_relative_to(kept) else Path(path.name)
            # The run's folder may have moved since.
            best = next((one for one in (places[0] / name, path) if one in files), None)
            if best is None:
                raise InputError(
                    f"run: the checkpoint with the best {callback['monitor']}, "
                    f"{places[0] / name}, is gone: name another one in checkpoint."
                )
            score = float(callback["best_model_score"])
            return best, f"the best by {callback['monitor']} ({score:.4g})"
    return last[-1], "the last"


def written(run: Path) -> tuple[tuple[str, int], ...]:
    """What lies where a run keeps checkpoints, with the time of its writing: another answer of
    :func:`choose_checkpoint` takes another one of this."""
    return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(_files(_places(run))))


def _files(places: list[Path]) -> dict[Path, Path]:
    """Checkpoints, and which place each is in."""
    # Names of ours make no folders; those of older runs, and a user's own slash, do.
    return {file: place for place in places for file in place.rglob("*.ckpt")}


def _places(run: Path) -> list[Path]:
    """The folders in which a run keeps checkpoints: its own, and those that its settings name."""
    given = read_yaml(run / "config.yaml").get("trainer", {}).get("callbacks") or []
    callbacks = given if isinstance(given, list) else [given]
    named = ((one.get("init_args") or {}).get("dirpath") for one in callbacks)
    others = (Path(place).expanduser().resolve() for place in named if place)
    return [run / "checkpoints", *others]


def _is_of(run: Path, file: Path) -> bool:
    """Whether a checkpoint in a folder that several runs keep theirs in is this run's. One of a run
    whose folder has moved since is not known for its own."""
    states = check(file)["callbacks"].values()
    folder = next((state["folder"] for state in states if has(state, "folder")), None)
    return folder is not None and Path(folder).resolve() == run.resolve()


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings of a file; empty where there is none."""
    if not file.exists():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {error}") from error


def has(value: Any, key: str) -> bool:
    """Whether a value is a mapping with a key."""
    return isinstance(value, dict) and key in value
