"""Checkpoints: whole under their names, or refused with the name of the last good one."""

import errno
import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from rotopo.cli import run
from rotopo.errors import InputError
from rotopo.run.checkpoints import WholeCheckpointIO, check, last_good, read
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, assert_equal, fit, weights


class Creates:
    """What runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_tokenizer_dir):
    """The configuration and the checkpoints of a run of six steps."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    config = save_config(tmp_path_factory.mktemp("trained"), tokenizer)
    fit(config, "run", *CHECKPOINTS)
    return config, config.parent / "run" / "version_0" / "checkpoints"


@pytest.fixture
def config(trained) -> Path:
    return trained[0]


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained[1], tmp_path / "checkpoints"))


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    target, events = tmp_path / "new" / "last.ckpt", []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))
        fsync(descriptor)

    def renamed(self, other):
        events.append(("rename", str(self), str(other)))
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    WholeCheckpointIO().save_checkpoint({"a": torch.ones(3)}, target)
    (first, part, there), (second, source, to), (third, parent, _) = events
    assert (first, second, third) == ("fsync", "rename", "fsync")
    assert not there
    assert part == source
    assert Path(part).parent == target.parent == Path(parent)
    assert to == str(target)
    assert os.listdir(target.parent) == ["last.ckpt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_the_last_one_whole(folder, monkeypatch, code):
    before = {file: file.read_bytes() for file in folder.iterdir()}

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 2000:
                raise OSError(code, os.strerror(code))
            return super().write(data)

    opened = Path.open

    def full(self, mode="r", **settings):
        return Full(self, "x") if mode == "xb" else opened(self, mode, **settings)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"new\.ckpt cannot be written.*last\.ckpt") as refusal:
        WholeCheckpointIO().save_checkpoint({"a": torch.ones(10_000)}, folder / "new.ckpt")
    assert os.strerror(code) in str(refusal.value)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_an_error_that_is_not_the_disks_stays_one(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        WholeCheckpointIO().save_checkpoint({"a": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_of_it_goes(tmp_path):
    file = tmp_path / "last.ckpt"
    left, others = f".last.ckpt.{'0' * 32}", [f".other.ckpt.{'0' * 32}", ".last.ckpt.notes"]
    for name in (left, *others):
        (tmp_path / name).write_bytes(b"PK")
    WholeCheckpointIO().save_checkpoint({"a": 1}, file)
    assert sorted(os.listdir(tmp_path)) == sorted(["last.ckpt", *others])


def test_a_remote_path_is_lightnings(monkeypatch):
    seen = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda *a: seen.append(a[2]))
    monkeypatch.setattr(
        TorchCheckpointIO, "load_checkpoint", lambda *a, **k: seen.append((a[1], k))
    )
    WholeCheckpointIO().save_checkpoint({}, "memory://a/b.ckpt")
    WholeCheckpointIO().load_checkpoint("memory://a/b.ckpt", weights_only=False)
    assert seen == ["memory://a/b.ckpt", ("memory://a/b.ckpt", {"weights_only": True})]


def test_every_truncation_is_refused_and_the_last_good_one_named(folder):
    whole = (folder / "last.ckpt").read_bytes()
    torn = folder / "last.ckpt"
    (good,) = folder.glob("*step=6.ckpt")
    for other in {*folder.iterdir()} - {torn, good}:
        other.unlink()
    n = len(whole)
    lengths = {*range(0, n, n // 40), *range(1, 10), *range(n - 30, n)}
    for length in sorted(lengths):
        torn.write_bytes(whole[:length])
        with pytest.raises(InputError) as refusal:
            check(torn)
        assert str(torn) in str(refusal.value)
        assert f"the last good one here is {good}" in str(refusal.value)
    torn.write_bytes(whole)
    assert read(torn)["global_step"] == 6


def test_a_flipped_bit_is_refused_or_changes_nothing(folder):
    file = folder / "last.ckpt"
    expected, whole = read(file, mmap=False), file.read_bytes()
    for other in {*folder.iterdir()} - {file}:
        other.unlink()
    generator, refused = random.Random(0), 0
    # The tensors and the pickle of the values; and the zip's directory, in its last few kilobytes.
    places = [generator.randrange(len(whole)) for _ in range(100)]
    places += [generator.randrange(len(whole) - 4000, len(whole)) for _ in range(100)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            found = read(file, mmap=False)
        except InputError:
            refused += 1
        else:
            assert equal(found, expected), f"byte {place}"
    assert refused > len(places) / 2
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        tensors = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 200]
    for tensor in tensors:
        start = whole.index(tensor.filename.encode(), tensor.header_offset)
        damaged = bytearray(whole)
        damaged[start + len(tensor.filename) + 150] ^= 64
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            check(file)


def foreign(kind: str, file: Path, folder: Path) -> None:
    good = torch.load(folder / "last.ckpt", weights_only=True)
    if kind == "empty":
        file.touch()
    elif kind == "random bytes":
        file.write_bytes(random.Random(0).randbytes(5000))
    elif kind == "text":
        file.write_text("global_step: 6\n")
    elif kind == "another zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "b")
    elif kind == "a state dict":
        torch.save(good["state_dict"], file)
    elif kind == "a tensor":
        torch.save(torch.ones(3), file)
    elif kind == "a bare Lightning checkpoint":
        torch.save({k: v for k, v in good.items() if k != "rotopo"}, file)
    elif kind == "half of ours":
        torch.save({k: v for k, v in good.items() if k != "loops"}, file)
    elif kind == "a pickle with code":
        file.write_bytes(pickle.dumps(Creates(file.parent / "created")))
    elif kind == "ours with code":
        torch.save(good | {"callbacks": Creates(file.parent / "created")}, file)
    elif kind == "a whole module":
        torch.save(torch.nn.Linear(2, 2), file)
    elif kind == "a folder":
        file.mkdir()


KINDS = (
    *("empty", "random bytes", "text", "another zip", "a state dict", "a tensor", "nothing"),
    *("a bare Lightning checkpoint", "half of ours", "a pickle with code", "ours with code"),
    *("a whole module", "a folder"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_of_ours_is_refused_unread(folder, kind):
    file = folder / "foreign.ckpt"
    foreign(kind, file, folder)
    with pytest.raises(InputError, match=r"foreign\.ckpt.*the last good one here is"):
        check(file)
    with pytest.raises(InputError):
        WholeCheckpointIO().load_checkpoint(file, weights_only=False)
    assert not (folder / "created").exists()


@pytest.mark.parametrize(
    ("command", "fault"),
    [("fit", "torn"), ("validate", "with code"), ("test", "torn"), ("predict", "with code")],
)
def test_every_command_refuses_it_in_one_line(config, folder, message, command, fault):
    file = folder / "foreign.ckpt"
    foreign("ours with code", file, folder)
    if fault == "torn":
        file.write_bytes((folder / "last.ckpt").read_bytes()[:-10])
    error = message(f"--ckpt_path={file}", f"--trainer.default_root_dir={folder}", command=command)
    assert error.count("\n") == 1
    assert "the last good one here is" in error
    assert not (folder / "created").exists()


def test_a_checkpoint_of_weights_only_can_be_tested_and_not_gone_on_from(config, message, tmp_path):
    alone = "--trainer.callbacks.save_weights_only=true"
    fit(config, "weights", *CHECKPOINTS, alone, "--trainer.max_epochs=1")
    (file, *_) = (config.parent / "weights").rglob("last.ckpt")
    place = f"--trainer.default_root_dir={tmp_path}"
    assert "no optimizer_states" in message(f"--ckpt_path={file}", place)
    run(["test", "--config", str(config), f"--ckpt_path={file}", place])


def test_weights_only_is_no_setting(message, tmp_path):
    error = message("--weights_only=false", f"--trainer.default_root_dir={tmp_path}")
    assert "weights_only" in error


def test_no_class_comes_from_a_checkpoints_hyperparameters(config, folder):
    """Lightning would build the class that a checkpoint names."""
    file = folder / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    named = {"_class_path": "rotopo.objectives.IPO", "beta": 7.0, "_instantiator": "a.b"}
    torch.save(checkpoint | {"hyper_parameters": named}, file)
    options = ["--trainer.max_epochs=3", "--model.scheduler.total_steps=6"]
    cli = fit(config, "named", f"--ckpt_path={file}", *options)
    assert type(cli.model).__name__ == "DPO"
    assert cli.model.beta == 0.3


def test_the_last_good_one_has_the_most_steps_whatever_the_clock_says(folder):
    (fifth,) = folder.glob("*step=5.ckpt")
    (sixth,) = folder.glob("*step=6.ckpt")
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    os.utime(sixth, (1e9, 1e9 + 1))
    os.utime(fifth, (1e9, 1e9 + 2))
    assert last_good(folder.parent) == sixth
    sixth.write_bytes(sixth.read_bytes()[:1000])
    assert last_good(folder.parent) == folder / "last.ckpt"
    (folder / "last.ckpt").unlink()
    assert last_good(folder.parent) == fifth
    for file in folder.iterdir():
        file.write_bytes(b"")
    assert last_good(folder.parent) is None
    with pytest.raises(InputError, match="holds no good one"):
        check(fifth)


def test_last_is_still_a_word(config, folder, capsys):
    end = read(folder / "last.ckpt", mmap=False)
    (third,) = folder.glob("*step=3.ckpt")
    third.replace(folder / "last.ckpt")
    options = [*CHECKPOINTS, f"--trainer.callbacks.dirpath={folder}"]
    resumed = fit(config, "resumed", *options, "--ckpt_path=last")
    assert resumed.trainer.global_step == 6
    assert_equal(weights(resumed), end["state_dict"], rtol=0, atol=0)
    for file in folder.glob("last*.ckpt"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        fit(config, "refused", *options, "--ckpt_path=last")
    assert "is torn or damaged: its end is missing" in capsys.readouterr().err


def test_ones_own_way_of_writing_is_kept(config, tmp_path):
    own = ["--trainer.plugins=lightning.pytorch.plugins.TorchCheckpointIO"]
    for options, expected in ((own, TorchCheckpointIO), ([], WholeCheckpointIO)):
        place = f"--trainer.default_root_dir={tmp_path}"
        cli = run(["validate", "--config", str(config), place, *options])
        assert type(cli.trainer.strategy.checkpoint_io) is expected
