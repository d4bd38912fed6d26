"""The settings of a run as its checkpoints hold them, and what of them another run has changed."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

import yaml

# What settings say of a run; the rest says which command is given.
PARTS = ("seed_everything", "trainer", "model", "data")
# Of the Trainer what a test needs in order to compute as training did, and to lie beside it.
_OF_TRAINER = ("precision", "default_root_dir")
# Settings in groups of their own. Any other mapping is one value, such as columns by their roles.
_GROUPS = ("trainer", "policy", "backbone", "sampling", "resampling")


@dataclass(frozen=True)
class Difference:
    """A setting that is not what the checkpoint was trained with.

    Attributes:
        name: as a command line has it, ``model.policy.adapter.lora_alpha``.
        here: its value, or a class path.
        there: the checkpoint's.
    """

    name: str
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"{self.name} is {shown(self.here)} here and {shown(self.there)} in the checkpoint"


def shown(value: Any) -> str:
    """A value as a command line has it; of several sources without what they leave to others."""
    if isinstance(value, list):
        given = (
            {k: v for k, v in one.items() if v is not None} if isinstance(one, Mapping) else one
            for one in value
        )
        return str(list(given))
    return "null" if value is None else str(value)


def plain(value: Any) -> Any:
    """A value in types that a checkpoint may hold: sets as sorted lists, enums as their values, of
    anything else its text."""
    if value is None or isinstance(value, bool | int | float) or type(value) is str:
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, int) else str(key): plain(v) for key, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value)


def leaves(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their names on a command line, class paths by those of the settings that
    take them. Several classes of one setting are told apart by their own names,
    ``trainer.callbacks.ModelCheckpoint.monitor``."""
    return {name: value for part in PARTS for name, value in _leaves(part, settings.get(part))}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, value["class_path"]
        arguments = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
        for key, inner in arguments.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, Mapping) and name.rpartition(".")[2] in _GROUPS:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, list) and value and all(map(_is_class, value)):
        paths = [one if isinstance(one, str) else one["class_path"] for one in value]
        yield name, paths
        owns = [path.rpartition(".")[2] for path in paths]
        for at, (own, one) in enumerate(zip(owns, value, strict=True)):
            again = owns[:at].count(own)
            inner = dict(_leaves(f"{name}.{own}{again + 1 if again else ''}", one))
            yield from list(inner.items())[1:]  # the class is in the list
    else:
        yield name, value


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Difference]:
    """What differs, as far as both know the setting: another release may have more of them. Of
    another class only the class."""
    ours, theirs = leaves(_listed(here)), leaves(_listed(there))
    found: list[Difference] = []
    for name in ours.keys() & theirs.keys():
        if not same(ours[name], theirs[name]):
            found.append(Difference(name, ours[name], theirs[name]))
    classes = {one.name for one in found if not isinstance(one.here, list)}
    inside = [any(one.name.startswith(f"{name}.") for name in classes) for one in found]
    order = {name: at for at, name in enumerate(ours)}
    kept = [one for one, hidden in zip(found, inside, strict=True) if not hidden]
    return sorted(kept, key=lambda one: order[one.name])


def _listed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a single callback as a list of one."""
    trainer = dict(settings.get("trainer") or {})
    callbacks = trainer.get("callbacks")
    trainer["callbacks"] = (
        callbacks if isinstance(callbacks, list) else [callbacks] * bool(callbacks)
    )
    return {**settings, "trainer": trainer}


def same(a: Any, b: Any) -> bool:
    """Whether two values of a setting are one: class paths too that name the same class."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, str) and isinstance(b, str) and a != b and "." in a and "." in b:
        named = _named(a)
        return named is not None and named is _named(b)
    return a == b


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):  # a file's name, or any text
        return None


def for_command(command: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What a command takes of a checkpoint's settings, where it is given no others; not the
    consent to run a model's own code, which nobody gives for another. An adapter that training
    started from is the one that it was, whatever lies in the folder of its run by now.

    Args:
        command: ``fit`` goes on, and takes all; others have a Trainer of their own.
        ours: what the checkpoint holds of rotopo's.
    """
    settings = ours["settings"]
    taken = {part: deepcopy(settings[part]) for part in PARTS if part in settings}
    arguments = taken["model"].get("init_args") or {}
    for model in (arguments.get("policy"), arguments.get("backbone")):
        (model or {}).pop("trust_remote_code", None)
        started_from = adapter_of(ours)
        if model and started_from is not None:
            model["path"] = started_from
    if command != "fit":
        trainer = settings.get("trainer") or {}
        taken["trainer"] = {name: trainer[name] for name in _OF_TRAINER if name in trainer}
    return taken


def adapter_of(ours: Mapping[str, Any]) -> str | None:
    """The folder of the adapter that training started from, if it did and the folder is there."""
    base = ours.get("base") or {}
    folder = base.get("merged") or base.get("goes_on")
    return folder if folder and Path(folder).is_dir() else None


def named_checkpoint(args: Sequence[str]) -> tuple[str | None, bool]:
    """The checkpoint that a command line names, itself or in a file of settings, and whether it
    names such a file."""
    path, files = None, False
    for at, option in enumerate(args):
        name, equals, value = option.partition("=")
        if not equals:
            value = args[at + 1] if at + 1 < len(args) else ""
        if name in ("--config", "-c"):
            files = True
            path = _in_file(Path(value)).get("ckpt_path", path)
        elif name == "--ckpt_path":
            path = value
    return (None if path in (None, "", "null") else str(path)), files


def is_file_of_ours(path: str | None) -> TypeGuard[str]:
    """Whether a checkpoint's name is that of a file or folder here: words like last and best have
    no suffix, and what has a protocol is not on this machine."""
    if not path or "://" in path:
        return False
    return bool(Path(path).suffix) or Path(path).exists()


def _in_file(file: Path) -> Mapping[str, Any]:
    """The settings of a YAML file; none of one that cannot be read, which the parser says."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}
