"""Private parts of Lightning and jsonargparse that are leant on: where, and whether they are there.

A failure after an upgrade says which name has moved; the files named in ``PRIVATE`` say what it is
for. Until they are adapted, pyproject.toml's upper bound keeps the upgrade out.
"""

import argparse
import ast
import inspect
import re
from pathlib import Path

import jsonargparse
import jsonargparse._parameter_resolvers
import jsonargparse._typehints
import jsonargparse._util
import lightning.fabric
import lightning.pytorch
import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy

ROOT = Path(__file__).parents[2]
# By the file that may name them, and what they are names of.
PRIVATE = {
    "rotopo/run/lightning.py": {
        "_accelerator_connector": Trainer,
        "_combined_loader": _FitLoop,
        "_data_fetcher": _FitLoop,
        "_data_parallel_size": ModelParallelStrategy,
        "_enable_version_counter": ModelCheckpoint,
        "_process_group_backend": ModelParallelStrategy,
        "_should_check_val_epoch": _TrainingEpochLoop,
        "_should_check_val_fx": _TrainingEpochLoop,
        "_signal_connector": Trainer,
        "_trainer": LightningModule,
    },
    "rotopo/lightning_cli.py": {
        "_get": LightningCLI,
        "_parse_ckpt_path": LightningCLI,
        "_run_subcommand": LightningCLI,
        "_set_seed": LightningCLI,
    },
    "rotopo/parsing.py": {
        "_actions": argparse._ActionsContainer,
        "_typehint": jsonargparse._typehints,
        "get_all_subclass_paths": jsonargparse._typehints,
        "get_import_path": jsonargparse._util,
        "discard_init_args_on_class_path_change": jsonargparse._typehints,
        "resolve_class_path_by_name": jsonargparse._typehints,
        "get_signature_parameters": jsonargparse._parameter_resolvers,
        "import_object": jsonargparse._util,
    },
}
CASES = [(name, owner) for names in PRIVATE.values() for name, owner in names.items()]


@pytest.mark.parametrize(("name", "owner"), CASES, ids=[name for name, _ in CASES])
def test_what_is_leant_on_is_there(name, owner):
    source = inspect.getsource(owner)
    assert re.search(
        rf"\b(def |self\.){name}\b|^(def |from .* import .*\b){name}\b", source, re.M
    ), (
        f"{owner.__name__} has no {name} any more: "
        + " or ".join(file for file, names in PRIVATE.items() if name in names)
        + " leans on it. Find what has taken its place, or lower the upper bound in pyproject.toml."
    )


def private_names(*packages) -> set[str]:
    """Names with an underscore that packages give to methods and attributes."""
    texts = [f.read_text("utf-8") for p in packages for f in Path(p.__file__).parent.rglob("*.py")]
    return {name for text in texts for name in re.findall(r"(?:self\.|def )(_[a-z]\w+)", text)}


def test_nobody_else_leans_on_private_parts():
    known = private_names(lightning.pytorch, lightning.fabric, jsonargparse)
    found = []
    for file in sorted((ROOT / "rotopo").rglob("*.py")):
        name, text = str(file.relative_to(ROOT)), file.read_text("utf-8")
        # What a class of the file itself declares is its own, except where it overrides.
        own = set(re.findall(r"(?:def |self\.|    )(_[a-z]\w+)\b[^=\n]*(?:= |\) ->)", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute):
                is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                names = [] if is_self and node.attr in own else [node.attr]
                names = [one for one in names if one in known]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if "._" in (node.module or "") else []
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if "._" in alias.name]
            else:
                continue
            for one in names:
                foreign = one.partition(".")[0] in ("lightning", "jsonargparse") or "." not in one
                if foreign and not allowed(name, one):
                    found.append(f"{name} names {one}")
    assert not found


def allowed(file: str, name: str) -> bool:
    if "." in name:
        return file == "rotopo/parsing.py" and name.startswith("jsonargparse.")
    # A method that a subclass calls on itself, and torch's names of a tensor's division, version.
    return name in PRIVATE.get(file, {}) or name in ("_output", "_spec", "_version")
