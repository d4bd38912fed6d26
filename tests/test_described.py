"""The description of settings: it is what the classes say, and quick to read."""

import json
import subprocess
import sys

import pytest

import rotopo.callbacks
import rotopo.objectives
import rotopo.reward
import rotopo.robust
from rotopo.describe import generate
from rotopo.described import FILE, NAMED_ONLY, PACKAGES, from_json, read, to_json, version


def same_versions() -> bool:
    versions = read().versions
    return all(versions[package] == version(package) for package in (*PACKAGES, *NAMED_ONLY))


def test_the_file_says_of_our_settings_what_generation_gives():
    """After a change of settings: ``python -m rotopo.describe``. Other tests' modules may have
    imported more classes than a command line does."""
    there, here = read(), from_json(json.loads(to_json(generate(packages=()))))
    ours = {path: one for path, one in there.classes.items() if path.startswith("rotopo.")}
    assert {path: here.classes.get(path) for path in ours} == ours
    for room in (rotopo.objectives, rotopo.callbacks, rotopo.reward, rotopo.robust):
        assert set(room.__all__) <= {one.name for one in ours.values()}
    if same_versions():
        assert here.commands == there.commands
        assert here.groups == there.groups


@pytest.mark.slow
@pytest.mark.skipif(not same_versions(), reason="the file describes other versions")
def test_the_file_is_what_generation_gives():
    code = "from rotopo.describe import *; print(to_json(generate()), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == FILE.read_text("utf-8")


def test_reading_imports_none_of_what_is_described():
    code = "import rotopo.described as d, sys; d.read(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "lightning", "jsonargparse", "numpy", "peft"}


def test_a_class_is_found_by_all_of_its_paths_unless_it_is_of_another_version():
    there = read()
    dpo = there.classes["rotopo.objectives.DPO"]
    assert there.of("rotopo.objectives.DPO") is there.of("rotopo.objectives.pairwise.DPO") is dpo
    assert dpo.by_name["beta"].default == 0.1
    other = read()
    other.versions["torch"] = "0"
    assert other.of("torch.optim.AdamW") is None
    assert other.of("rotopo.objectives.DPO") is not None
