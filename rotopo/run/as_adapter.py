"""A run's folder as the path of a model: its adapter, taken out of a checkpoint."""

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from rotopo.errors import InputError
from rotopo.files import write_whole, writing_whole_folder
from rotopo.pretrained import cache_dir
from rotopo.run.checkpoints import read
from rotopo.run.kept import choose_checkpoint, written

if TYPE_CHECKING:  # else rotopo --help would wait for PEFT
    from rotopo.models.settings import BackboneConfig

    Config = TypeVar("Config", bound=BackboneConfig)
else:
    Config = TypeVar("Config")

_MODEL = "policy.model."  # before the names of a policy's parameters


def from_runs(config: Config) -> Config:
    """The settings of a model with adapters' folders in the place of runs' folders, and says so."""
    changed: dict[str, Any] = {}
    for name in ("path", "reference_path"):
        path = getattr(config, name, None)
        if path is not None:
            changed[name], said = _resolved(path)
            if said:
                rank_zero_info(said)
    return replace(config, **changed)


def as_adapter(path: str) -> str:
    """The folder of the adapter that a run has trained, by its best checkpoint where it monitors a
    metric and else by its last; of any other path the path itself.

    The folder lies in the cache. Its tensors have their names in the model.

    Args:
        path: of a model or an adapter, or a run's folder.

    Raises:
        InputError: a run that has no checkpoint, or none whose adapter can be put on a base model
            that others have.
    """
    return _resolved(path)[0]


def _resolved(path: str) -> tuple[str, str]:
    """As :func:`as_adapter`, and what is to be said of it."""
    run = Path(path).expanduser()
    others = ("config.json", "adapter_config.json")
    if not (run / "config.yaml").is_file() or any((run / name).exists() for name in others):
        return path, ""
    return _taken(path, run.absolute(), cache_dir(), written(run))


@lru_cache(maxsize=4)
def _taken(path: str, run: Path, cache: Path, _: tuple[tuple[str, int], ...]) -> tuple[str, str]:
    """The adapter's folder of a run's folder in which these checkpoints lie. Parser, tokenizer and
    model ask one after the other, and each time all of a checkpoint would be read."""
    try:
        file, which = choose_checkpoint(run, None)
    except InputError as error:
        raise InputError(
            f"{path} is a run's folder, and none of its checkpoints can be chosen: let it go on "
            "until it has written one, or export the one that you mean and name the export. "
            f"({error})"
        ) from error
    state = read(file, optimizers=False)
    ours, names = state["rotopo"], state["state_dict"]
    adapter, base = ours.get("adapter"), ours.get("base")
    why = None
    if base is None:
        why = "its checkpoint does not say of which base model it is, since an earlier release "
        why += "wrote it"
    elif not any(name.startswith(_MODEL) for name in names):
        why = "it has trained a reward model"
    elif adapter is None:
        why = "it has trained every weight"
    elif base["moved"] or base["merged"]:
        why = "its adapter belongs to a base that was made for it"
    if why is not None:
        raise InputError(f"{path} is a run's folder, and {why}: export it, and name the export.")
    weights = {n.removeprefix(_MODEL): v for n, v in names.items() if n.startswith(_MODEL)}
    weights |= {f"base_model.model.{n}": v for n, v in state["start"]["fixed"].items()}
    facts = [str(file.resolve()), file.stat().st_mtime_ns, state["global_step"], adapter, base]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "adapters" / f"{run.resolve().name}-{digest}"
    if not folder.is_dir():
        from safetensors.torch import save_file

        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), writing_whole_folder(folder) as part:
            settings = adapter | {"base_model_name_or_path": base["path"]}
            write_whole(part / "adapter_config.json", json.dumps(settings, indent=1))
            tensors = {name: value.contiguous() for name, value in weights.items()}
            save_file(tensors, part / "adapter_model.safetensors")
    said = f"{path} is a run's folder: its adapter is taken from {file.name}, {which}."
    return str(folder), said
