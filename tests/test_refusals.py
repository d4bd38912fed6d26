"""What other packages say of settings is one line; faults, and users' own, keep their traceback."""

import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rotopo import cli
from rotopo.cli import main, run
from rotopo.errors import InputError, chain
from rotopo.files import full_disk
from rotopo.objectives import DPO
from rotopo.refusals import fault, refusal
from tests.small_run import save_config

REPORT = "this is a fault of rotopo's"


class StumblesToo(DPO):
    """And a module."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        {}["nothing"]


class Stumbles(Callback):
    """A callback of a user's, with a mistake in it."""

    def __init__(self, early: bool = False) -> None:
        if early:
            {}["nothing"]

    def setup(self, *_, **__) -> None:
        {}["nothing"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def listed(name: str, **settings) -> str:
    return f"--trainer.callbacks=[{{class_path: {name}, init_args: {settings}}}]"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.logger=WandbLogger"], "trainer.logger (WandbLogger): Requirement 'wandb"),
        (
            ["--trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: x}}, MLFlowLogger]"],
            "trainer.logger (MLFlowLogger): Requirement 'mlflow",
        ),
        (["--trainer.strategy=deepspeed"], "you must have DeepSpeed installed"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.precision=8"], "8"),
        (["--trainer.profiler=xyz"], "profiler"),
        (["--trainer.limit_train_batches=-1"], "limit_train_batches"),
        (["--trainer.val_check_interval=100"], "`val_check_interval` (100) must be less"),
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval is 0"),
        (["--trainer.default_root_dir=/proc/x"], "/proc/x cannot be used"),
        ([listed("EarlyStopping", monitor="val/loss", mode="up")], "trainer.callbacks (EarlyStop"),
        ([listed("ModelCheckpoint", save_top_k=3)], "trainer.callbacks (ModelCheckpoint)"),
        ([listed("BatchSizeFinder")], "trainer.callbacks (BatchSizeFinder): Field batch_size"),
        ([listed("LearningRateFinder")], "When using the learning rate finder"),
        (["--model.optimizer.lr=-1"], "model.optimizer (AdamW): Invalid learning rate: -1"),
        (["--model.optimizer.betas=[2,3]"], "model.optimizer (AdamW): Invalid beta"),
        (["--model.optimizer.fused=true", "--model.optimizer.foreach=true"], "(AdamW): `fused`"),
        (["--model.optimizer=torch.optim.SparseAdam"], "model.optimizer: SparseAdam does not"),
        (
            [
                *("--model.optimizer.fused=true", "--trainer.gradient_clip_val=1"),
                "--trainer.precision=16-mixed",
            ],
            "trainer.gradient_clip_val: The current optimizer, AdamW, does not allow",
        ),
        (["--model.policy.adapter.task_type=X"], "policy.adapter (LoraConfig): Invalid task type"),
        (["--model.policy.adapter=OFTConfig", "--model.policy.adapter.r=7"], "(OFTConfig)"),
    ],
)
def test_what_others_say_of_settings_is_one_line(message, options, expected):
    assert expected in message(*options).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [1\n", "line 2"),
        ("- 1\n", "more.yaml: holds no settings"),
        ("trainer: {max_epochs: many}\n", "many"),
        ("trainer: {no_such: 1}\n", "no_such"),
        ("model: nowhere.Nothing\n", "nowhere.Nothing"),
        ("trainer:\n  max_steps: 1\n  max_epochs: 1\n  max_steps: 2\n", "line 4: 'max_steps'"),
        ("trainer: {max_epochs: '\udcff'}\n", "utf-8"),
    ],
)
def test_so_is_what_is_wrong_in_a_file(message, tmp_path, text, expected):
    (tmp_path / "more.yaml").write_text(text, errors="surrogateescape")
    assert expected in message(f"--config={tmp_path / 'more.yaml'}")


def test_a_class_of_the_users_own_is_described_once_it_is_imported(message):
    error = message("--model=tests.test_refusals.StumblesToo", "--model.betaa=2", "--trainer.x=1")
    assert error.splitlines() == [
        "rotopo: model.betaa: StumblesToo has no setting 'betaa'; did you mean 'beta'?",
        "rotopo: trainer.x: the Trainer has no setting 'x'",
    ]


def test_all_that_is_wrong_with_the_data_is_said_in_one_go(message):
    error = message("--data.pairs_per_step=0", "--data.validation=2", "--data.max_length=1")
    assert [line.partition(" is ")[0] for line in error.splitlines() if "rotopo: " in line] == [
        "rotopo: data.validation",
        "rotopo: data.pairs_per_step",
        "rotopo: data.max_length",
    ]


def test_a_class_whose_file_misses_a_package_is_one_line(message, tmp_path, monkeypatch):
    (tmp_path / "my_objectives.py").write_text("import no_such_package\n\nclass Mine: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "no_such_package" in message("--model=my_objectives.Mine")


@pytest.mark.parametrize("early", [True, False])
def test_mistakes_of_the_users_own_keep_their_traceback(config, early):
    option = f"[{{class_path: tests.test_refusals.Stumbles, init_args: {{early: {early}}}}}]"
    with pytest.raises(KeyError, match="nothing") as stop:
        run(["fit", f"--config={config}", f"--trainer.callbacks={option}"])
    assert traceback.extract_tb(stop.value.__traceback__)[-1].filename == __file__
    assert fault(stop.value) is None


def test_so_do_those_in_a_module(config):
    with pytest.raises(KeyError, match="nothing"):
        run(["fit", f"--config={config}", "--model=tests.test_refusals.StumblesToo"])


def test_what_is_raised_in_a_step_keeps_its_traceback(config, monkeypatch, capsys):
    monkeypatch.setattr(DPO, "losses", lambda self, log_probs: torch.stack([torch.ones(1), 1]))
    with pytest.raises(TypeError):
        run(["fit", f"--config={config}"])


def test_a_fault_says_where_to_report_it(config, monkeypatch, capsys):
    """As if a line of ours were wrong: compiled under the name of our file."""
    code = compile("def broken(*_):\n    return None + 1\n", cli.__file__, "exec")
    names: dict = {}
    exec(code, names)
    monkeypatch.setattr(DPO, "configure_model", names["broken"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert REPORT in error.strip().splitlines()[-1]
    assert "http" not in error.strip().splitlines()[-1]


def test_out_of_memory_is_no_fault():
    with pytest.raises(torch.OutOfMemoryError) as stop:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "data.token_budget" in fault(stop.value)


def test_libraries_that_stumble_are_not_taken_for_a_word_on_settings():
    with pytest.raises(ValueError, match="invalid literal") as stop:
        torch.Size(int("x") for _ in range(1))
    assert refusal(stop.value, None, began=False) is None


def test_errors_that_came_from_one_another_end():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert list(chain(one)) == [one, other]
    assert full_disk(one) is None


def test_a_folder_that_may_not_be_written_is_named():
    error = PermissionError(13, "Permission denied", "/home/else/last.ckpt")
    refused = refusal(error, None, began=True)
    assert isinstance(refused, InputError)
    assert "/home/else/last.ckpt cannot be used: Permission denied" in str(refused)


@pytest.mark.slow
def test_the_console_script_ends_with_status_2(config):
    command = Path(sys.executable).with_name("rotopo")
    arguments = [command, "fit", "--config", config, "--trainer.logger=WandbLogger"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
