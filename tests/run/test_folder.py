"""Each run has a folder of its own, and writes over nothing of another's."""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import lightning.pytorch.loggers.wandb
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from rotopo.cli import run
from rotopo.errors import InputError
from rotopo.export.command import export
from rotopo.run.folder import RunFolder, root_of
from rotopo.run.interruption import free_name
from rotopo.run.keeping import flatten_names
from rotopo.run.kept import choose_checkpoint
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
WHOLE = {"checkpoints", "config.yaml", "doctor.json", "hparams.yaml", "metrics.csv"}


@pytest.fixture
def config(tmp_path, tiny_tokenizer) -> Path:
    """Without a schedule, whose length a resumed run would change."""
    file = save_config(tmp_path, tiny_tokenizer)
    settings = yaml.safe_load(file.read_text("utf-8"))
    del settings["model"]["init_args"]["scheduler"]
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def fit(config: Path, *options: str) -> Path:
    return Path(run(["fit", f"--config={config}", *options]).trainer.log_dir)


def contents(folder: Path) -> dict[Path, str]:
    """Hashes of all files below a folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    together = Barrier(20)

    def number(_) -> int:
        folder = RunFolder(tmp_path / "runs")
        together.wait()
        return folder.number

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(number, range(20))) == list(range(20))
    assert len(list((tmp_path / "runs").iterdir())) == 20


def test_a_number_is_not_given_again(tmp_path):
    for name in ("version_3", "version_x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_7").touch()
    first = RunFolder(tmp_path)
    assert not (tmp_path / "version_8").exists()  # nobody has asked
    assert first.number == first.number == 8
    assert RunFolder(tmp_path).number == 9


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"default_root_dir is s3://bucket/runs"):
        root_of("s3://bucket/runs")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"default_root_dir: .*file cannot be used"):
        _ = RunFolder(tmp_path / "file").number
    assert root_of("~/runs") == Path.home() / "runs"
    assert root_of(None) == Path("runs")


@pytest.mark.parametrize("given", ["false", "list"])
def test_whatever_the_loggers_a_run_is_in_its_folder(config, tmp_path, given):
    options = {
        "false": ["--trainer.logger=false"],
        "list": [
            f"--trainer.logger=[{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}]"
        ],
    }[given]
    folder = fit(config, *SHORT, *options)
    assert folder == tmp_path / "runs" / "version_0"
    assert {path.name for path in folder.iterdir()} == WHOLE
    assert "train/loss" in pd.read_csv(folder / "metrics.csv")
    (file,) = (folder / "checkpoints").iterdir()
    if given == "list":
        own = tmp_path / "lightning_logs" / "version_0"
        expected, found = (pd.read_csv(f / "metrics.csv") for f in (folder, own))
        assert expected["train/loss"].equals(found["train/loss"])
    if given == "list":
        # A slash in a name has made a folder, in older runs.
        nested = folder / "checkpoints" / "epoch=0-val" / "loss=0.7.ckpt"
        nested.parent.mkdir()
        file.rename(nested)
        assert choose_checkpoint(folder, None) == (nested, "the last")
        return
    before = contents(folder)
    for n, command in enumerate(("validate", "test", "predict"), 1):
        cli = run([command, f"--config={config}", f"--ckpt_path={file}", *options])
        assert Path(cli.trainer.log_dir) == tmp_path / "runs" / f"version_{n}"
        assert (tmp_path / "runs" / f"version_{n}" / "config.yaml").exists()
    resumed = fit(config, f"--ckpt_path={file}", *options)
    assert {path.name for path in resumed.iterdir()} == WHOLE
    assert contents(folder) == before


def test_a_dry_run_makes_no_folder(config, tmp_path):
    run(["fit", f"--config={config}", "--trainer.fast_dev_run=true"])
    assert not (tmp_path / "runs").exists()


def test_a_table_of_ones_own_takes_no_other_runs_place(config, tmp_path, message):
    folder = fit(config, *SHORT)
    before = contents(folder)
    own = "{class_path: CSVLogger, init_args: {save_dir: %s, name: '', version: 0}}"
    error = message(*SHORT, f"--trainer.logger={own % folder.parent}")
    assert "CSVLogger would delete" in error
    assert contents(folder) == before


# Names, folders and top-k of ModelCheckpoint


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("{epoch}-{val/loss:.3f}", "epoch=2-val_loss=0.700"),
        ("{val/rewards/accuracy:.1f}-{val/loss}", "val_rewards_accuracy=0.5-val_loss=0.7"),
        ("best/{epoch}-{val/loss:.1f}", "best/epoch=2-val_loss=0.7"),
        ("{epoch:02d}-{step}", "epoch=02-step=9"),
        (None, "epoch=2-step=9"),
    ],
)
def test_a_metrics_slash_makes_no_folder(filename, name):
    keeper = ModelCheckpoint(filename=filename)
    flatten_names([keeper])
    values = {"val/loss": 0.7, "val/rewards/accuracy": 0.5}
    metrics = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    metrics |= {"epoch": torch.tensor(2), "step": torch.tensor(9)}
    assert keeper.format_checkpoint_name(metrics) == f"{name}.ckpt"


def test_a_name_without_metrics_names_is_the_users():
    keeper = ModelCheckpoint(filename="a/{val/loss:.1f}", auto_insert_metric_name=False)
    flatten_names([keeper])
    assert keeper.format_checkpoint_name({"val/loss": torch.tensor(0.7)}) == "a/0.7.ckpt"


def test_checkpoints_elsewhere_are_one_fits(config, tmp_path, message):
    kept = tmp_path / "kept"
    options = [
        *("--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.dirpath={kept}"),
        *("--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.filename=best"),
        "--trainer.callbacks.save_last=true",
    ]
    first = fit(config, *options, "--trainer.max_epochs=1")
    before = contents(kept)
    assert {str(path) for path in before} == {"best.ckpt", "last.ckpt"}
    assert choose_checkpoint(first, None)[0] == kept / "best.ckpt"

    assert f"{kept}, holds checkpoints of another run" in message(*options)
    resumed = fit(config, *options, f"--ckpt_path={kept / 'last.ckpt'}")
    assert {k: v for k, v in contents(kept).items() if k in before} == before
    assert {str(p) for p in contents(kept)} == {
        f"{n}{v}.ckpt" for n in ("best", "last") for v in ("", "-v1")
    }
    # Each run's folder leads to its own.
    assert choose_checkpoint(first, None)[0] == kept / "best.ckpt"
    assert choose_checkpoint(resumed, None)[0] == kept / "best-v1.ckpt"
    assert "is no checkpoint of it" in _error(choose_checkpoint, fit(config, *SHORT), kept)


def _error(choose, run_folder: Path, kept: Path) -> str:
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "A", "init_args": {"dirpath": str(kept)}}]
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for file in (run_folder / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(InputError) as refusal:
        choose(run_folder, None)
    return str(refusal.value)


def test_two_settings_that_would_write_over_checkpoints_are_refused(message, tmp_path):
    settings = f"dirpath: {tmp_path / 'kept'}, enable_version_counter: false"
    keeper = f"{{class_path: ModelCheckpoint, init_args: {{{settings}}}}}"
    assert "leave one of the two out" in message(f"--trainer.callbacks=[{keeper}]")


def test_an_interruption_takes_no_earlier_ones_name(tmp_path):
    for name in ("last-interrupted", "last-interrupted-v1", "last-interrupted-v2"):
        assert free_name(str(tmp_path)) == str(tmp_path / f"{name}.ckpt")
        (tmp_path / f"{name}.ckpt").touch()


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_ranks_share_one_folder(config, tmp_path, starter):
    options = [*SHORT, *strategy("ddp"), "--trainer.logger=false"]
    for n in range(2):
        on_ranks(2, "fit", f"--config={config}", *options, starter=starter)
        found = {path.name for path in (tmp_path / "runs").iterdir()} - {".slurm"}
        assert found == {f"version_{i}" for i in range(n + 1)}
        folder = tmp_path / "runs" / f"version_{n}"
        assert {path.name for path in folder.iterdir()} == WHOLE
        assert len(list((folder / "checkpoints").iterdir())) == 1


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch) -> list[dict[str, Any]]:
    """A stand-in for the package: what its runs were begun with, and what was logged to each."""
    begun: list[dict[str, Any]] = []

    class Run:
        def __init__(self, **settings):
            self.settings, self.logged = settings, []
            self.id = settings["id"] or f"id{len(begun)}"
            self.config = MagicMock()
            begun.append(
                {"id": self.id, "logged": self.logged, **settings, "given": settings["id"]}
            )

        def log(self, values):
            self.logged.append(values)

    module, lib, runs = (ModuleType(n) for n in ("wandb", "wandb.sdk.lib", "wandb.wandb_run"))
    module.run, module.init = None, Run
    lib.RunDisabled, runs.Run = type("RunDisabled", (), {}), Run
    for name, one in (("wandb", module), ("wandb.sdk.lib", lib), ("wandb.wandb_run", runs)):
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setattr(lightning.pytorch.loggers.wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setenv("WANDB_MODE", "offline")  # which the logger sets
    return begun


WANDB = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true"]


def test_wandb_goes_on_under_its_id(config, wandb):
    folder = fit(config, *SHORT, *WANDB)
    assert {path.name for path in folder.iterdir()} == WHOLE
    (file,) = (folder / "checkpoints").iterdir()
    resumed = fit(config, *WANDB, f"--ckpt_path={file}")
    settings = yaml.safe_load((resumed / "config.yaml").read_text())
    assert settings["trainer"]["logger"]["init_args"]["id"] == "id0"
    (last,) = (resumed / "checkpoints").iterdir()
    longer = "--trainer.max_epochs=3"
    fit(config, *WANDB, longer, "--trainer.logger.id=mine", f"--ckpt_path={last}")
    assert [one["given"] for one in wandb] == [None, "id0", "mine"]
    assert {one["resume"] for one in wandb} == {"allow"}
    assert all(any("train/loss" in values for values in one["logged"]) for one in wandb)


def test_each_of_several_goes_on_under_its_own(config, tmp_path, wandb):
    a, b = (f"{{class_path: WandbLogger, init_args: {{project: {name}}}}}" for name in "ab")
    table = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}"
    several = f"--trainer.logger=[{a}, {table}, {b}]"
    (file,) = (fit(config, *SHORT, several) / "checkpoints").iterdir()
    fit(config, several, f"--ckpt_path={file}")
    assert [(one["project"], one["given"]) for one in wandb] == [
        ("a", None),
        ("b", None),
        ("a", "id0"),
        ("b", "id1"),
    ]


@pytest.mark.parametrize(
    "loggers",
    [
        pytest.param(["--trainer.logger=false"], id="none"),
        pytest.param(WANDB, id="wandb", marks=pytest.mark.slow),
    ],
)
def test_a_second_run_changes_nothing_of_the_firsts_export(config, tmp_path, wandb, loggers):
    """The second's adapter is of another rank, and its scale another."""
    first = fit(config, *SHORT, *loggers)
    export(first, tmp_path / "before" / "out", prompts=2)
    other = ["--model.policy.adapter.r=2", "--model.beta=0.7", "--seed_everything=5"]
    second = fit(config, *SHORT, *loggers, *other)
    assert second != first
    export(first, tmp_path / "after" / "out", prompts=2)
    assert contents(tmp_path / "before") == contents(tmp_path / "after")
    (last,) = (first / "checkpoints").iterdir()
    export(first, tmp_path / "named" / "out", checkpoint=last, form="adapter", prompts=2)
    adapter = json.loads((tmp_path / "named" / "out" / "adapter_config.json").read_text())
    assert adapter["r"] == 4
