"""Checkpoints as folders: what is damaged, torn or half replaced, in a group of one process."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from rotopo import ranks
from rotopo.errors import InputError
from rotopo.files import full_disk
from rotopo.run import checkpoint_folders, checkpoints


@pytest.fixture(autouse=True)
def group(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def checkpoint(step: int) -> dict:
    weights = {"a.weight": torch.arange(12.0).view(3, 4) + step, "b": torch.tensor(2.5)}
    state = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((3, 4), 0.5 * step)}}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "global_step": step,
        "loops": {},
        "lr_schedulers": [],
        "callbacks": {},
        "random_states": [],
        "rotopo": {"version": "0"},
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found["global_step"] == expected["global_step"]
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=0)
    (one,), (two,) = found["optimizer_states"], expected["optimizer_states"]
    assert one["param_groups"] == two["param_groups"]
    for name, value in two["state"][0].items():
        torch.testing.assert_close(one["state"][0][name], value, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the checkpoints of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint_folders.write(folder / f"{step}.ckpt", checkpoint(step))
    return folder


def test_what_is_written_is_read(folder):
    assert_same(checkpoints.read(folder / "2.ckpt"), checkpoint(2))
    assert checkpoints.last_good(folder) == folder / "2.ckpt"
    assert sorted(f.name for f in folder.iterdir()) == ["1.ckpt", "2.ckpt"]
    without = checkpoints.read(folder / "2.ckpt", optimizers=False)
    assert without["optimizer_states"][0]["state"][0] == {"step": None, "exp_avg": None}


def damaged(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-3])
    else:
        content[20 if how == "header" else len(content) // 2] ^= 4
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("shard-*.safetensors", how) for how in ("removed", "cut", "header", "middle")),
        *(("meta.pt", how) for how in ("removed", "cut")),
    ],
)
def test_a_damaged_part_is_refused_and_the_last_good_one_named(folder, name, how):
    (file,) = (folder / "2.ckpt").glob(name)
    damaged(file, how)
    with pytest.raises(InputError, match=r"the last good one here is .*1\.ckpt"):
        checkpoints.read(folder / "2.ckpt")
    assert checkpoints.last_good(folder) == folder / "1.ckpt"


def test_a_full_disk_is_the_disks_error_and_leaves_the_last_one_whole(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(OSError, match="No space") as error:
        checkpoint_folders.write(folder / "2.ckpt", checkpoint(3))
    assert full_disk(error.value) is not None
    assert sorted(f.name for f in folder.iterdir()) == ["1.ckpt", "2.ckpt"]
    assert_same(checkpoints.read(folder / "2.ckpt"), checkpoint(2))


def test_what_another_node_keeps_for_itself_is_missed_at_once(folder, monkeypatch):
    """Not when the run is to go on, days later."""
    elsewhere = {"shard-00002-model-00001-of-00001.safetensors": "0" * 64}
    of_all = ranks.of_all
    monkeypatch.setattr(
        ranks,
        "of_all",
        lambda value: [*of_all(value), *([elsewhere] if isinstance(value, dict) else [])],
    )
    with pytest.raises(InputError, match="a folder that all nodes share"):
        checkpoint_folders.write(folder / "2.ckpt", checkpoint(3))
    assert sorted(f.name for f in folder.iterdir()) == ["1.ckpt", "2.ckpt"]
    assert_same(checkpoints.read(folder / "2.ckpt"), checkpoint(2))


class Killed(BaseException):
    pass


def test_killed_while_one_replaces_another_neither_is_lost(folder, monkeypatch):
    def killed(self, target):
        raise Killed

    with monkeypatch.context() as patch:  # behind the first of two renamings
        original = Path.rename
        patch.setattr(
            Path, "rename", lambda a, b: original(a, b) if b.name[-4:] == ".old" else killed(a, b)
        )
        with pytest.raises(Killed):
            checkpoint_folders.write(folder / "2.ckpt", checkpoint(3))
    good = checkpoints.last_good(folder)
    assert good is not None
    assert_same(checkpoints.read(good), checkpoint(2))
    for step in (4, 5):  # and what was left is in nobody's way
        checkpoint_folders.write(folder / "2.ckpt", checkpoint(step))
        shutil.copytree(folder / "1.ckpt", folder / ".2.ckpt.old", dirs_exist_ok=True)
    assert_same(checkpoints.read(folder / "2.ckpt"), checkpoint(5))


def test_a_folder_takes_the_place_of_a_file(folder):
    torch.save(checkpoint(1), folder / "last.ckpt")
    checkpoint_folders.write(folder / "last.ckpt", checkpoint(2))
    assert_same(checkpoints.read(folder / "last.ckpt"), checkpoint(2))
