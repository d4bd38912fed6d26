"""The command line: class swaps, messages for bad input, predict and test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from rotopo.cli import run
from rotopo.objectives.base import PreferenceModule
from tests.small_run import save_config, save_pairs


class Other(PreferenceModule):
    """An objective that shares a setting's name with DPO, and has another default."""

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.beta, self.gamma = beta, gamma

    def losses(self, log_probs):
        return -torch.nn.functional.logsigmoid(self.beta * log_probs.chosen - self.gamma)

    def rewards(self, log_probs):
        return log_probs.chosen, log_probs.rejected


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture
def settings(config, capsys):
    """The settings that a command line ends up with."""

    def parse(*options: str) -> dict:
        with pytest.raises(SystemExit) as stop:
            run(["fit", "--config", str(config), *options, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_a_new_objective_keeps_what_all_share_and_drops_the_old_ones_own(settings):
    before = settings()["model"]
    after = settings("--model=tests.test_cli.Other")["model"]
    assert before["init_args"]["beta"] == 0.3
    assert after["class_path"] == "tests.test_cli.Other"
    assert after["init_args"]["beta"] == 2.0
    for shared in ("policy", "optimizer", "scheduler", "sampling"):
        assert after["init_args"][shared] == before["init_args"][shared]


def test_a_setting_given_after_the_swap_or_in_it_counts(settings, tmp_path):
    after = settings("--model=tests.test_cli.Other", "--model.beta=5")["model"]["init_args"]
    assert after["beta"] == 5
    swap = tmp_path / "swap.yaml"
    swap.write_text("model: {class_path: tests.test_cli.Other, init_args: {beta: 7}}")
    assert settings(f"--config={swap}")["model"]["init_args"]["beta"] == 7
    before = settings("--model.beta=5", "--model=tests.test_cli.Other")["model"]["init_args"]
    assert before["beta"] == 2.0


def test_the_same_class_again_keeps_everything(settings):
    assert settings("--model=DPO")["model"]["init_args"]["beta"] == 0.3


def test_of_adapters_only_the_target_modules_carry_over(settings):
    adapter = settings("--model.policy.adapter=OFTConfig")["model"]["init_args"]["policy"][
        "adapter"
    ]
    assert adapter["class_path"] == "peft.OFTConfig"
    assert adapter["init_args"]["target_modules"] == ["q_proj"]
    assert adapter["init_args"]["r"] == 0  # LoRA's 4 would be refused beside a block size
    rotation = settings("--model.policy.adapter=rotopo.rotation.RotationConfig")
    init_args = rotation["model"]["init_args"]["policy"]["adapter"]["init_args"]
    assert init_args["target_modules"] == ["q_proj"]
    assert init_args["n_householder"] == 2


def test_of_optimisers_nothing_carries_over(settings):
    optimizer = settings("--model.optimizer=SGD")["model"]["init_args"]["optimizer"]
    assert optimizer["init_args"]["lr"] == 0.001  # SGD's own default, not AdamW's 0.01


class Rprop(torch.optim.Optimizer):
    """Another package's, of the same name as torch's."""


def test_a_short_name_of_an_optimiser_is_torchs(settings):
    optimizer = settings("--model.optimizer=Rprop")["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.Rprop"


@pytest.mark.parametrize("file", ["pairwise", "a_file_that_is_gone"])
def test_a_class_that_has_left_its_file_is_found_in_its_room(settings, file):
    """A saved config.yaml names the file where its user did."""
    after = settings(f"--model=rotopo.objectives.{file}.SamPO")["model"]
    assert after["class_path"] == "rotopo.objectives.SamPO"
    kept = settings("--model=rotopo.objectives.pairwise.DPO")["model"]
    assert kept["class_path"] == "rotopo.objectives.pairwise.DPO"


def test_the_tokenizer_is_the_models(config):
    cli = run(["test", "--config", str(config)])
    assert cli.datamodule.pairs.tokenizer_path == cli.model.policy_config.path


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.policy.path=/nowhere/at_all", "/nowhere/at_all"),
        ("--model.policy.adapter.target_modules=[no_such_layer]", "no_such_layer"),
        ("--model.policy.attention=telepathy", "policy.attention"),
        ("--model.beta=-1", "beta is -1"),
        ("--trainer.precision=bf16-true", "policy.dtype"),
        ("--model.betta=1", "betta"),
        ("--data.source=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--data.format=telegram", "telegram"),
        ("--data.pairs_per_step=500", "data.pairs_per_step is 500"),
        ("--data.pad_token=<|eos|>x", "data.pad_token"),
        ("--data.pad_token=<|im_end|>", "data.pad_token"),
        ("--data.token_budget=20", "data.token_budget"),
        ("--trainer.accumulate_grad_batches=7", "accumulate_grad_batches"),
        ("--data.validation=train[:5]", "each has to be another one"),
        ("--ckpt_path=/nowhere.ckpt", "/nowhere.ckpt"),
    ],
)
def test_bad_settings_are_named(message, option, expected):
    assert expected in message(option)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b"}, ["rejected"]),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, ["row 40", "chosen"]),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["row 40", "chosen", "rejected"]),
    ],
)
def test_bad_rows_are_named(message, config, row, expected):
    source = save_pairs(config.parent / "bad.jsonl")
    source.write_text(source.read_text() + json.dumps(row) + "\n")
    error = message(f"--data.source={source}")
    for part in expected:
        assert part in error


def test_bytes_that_are_not_text_are_named(message, config):
    source = save_pairs(config.parent / "bad.jsonl")
    source.write_bytes(
        source.read_bytes() + b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n'
    )
    error = message(f"--data.source={source}")
    assert "bad.jsonl" in error
    assert "UTF-8" in error


def test_a_prompt_longer_than_the_limit_is_named(message):
    error = message("--data.max_length=20", "--data.truncation=response_right")
    assert "data.max_length" in error
    assert "row" in error


def test_a_tokenizer_without_template_or_pad_is_named(message, config):
    settings = config.parent / "model" / "tokenizer_config.json"
    kept = settings.read_text()
    (config.parent / "model" / "chat_template.jinja").unlink()
    assert "data.chat_template" in message()
    settings.write_text(json.dumps(json.loads(kept) | {"pad_token": None}))
    template = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    assert "data.pad_token" in message(f"--data.chat_template={template}")


def test_a_checkpoint_is_tested_as_it_was_trained(config):
    trained = run(["fit", "--config", str(config)])
    (expected,) = trained.trainer.test(trained.model, trained.datamodule, verbose=False)
    (checkpoint,) = (config.parent / "runs").rglob("*.ckpt")
    loaded = run(["test", "--config", str(config), f"--ckpt_path={checkpoint}"])
    found = {name: float(value) for name, value in loaded.trainer.callback_metrics.items()}
    assert found == pytest.approx(expected)
    assert expected["test/rewards/margin"] != 0


def test_predict_writes_one_response_per_prompt(config):
    cli = run(["predict", "--config", str(config)])
    (file,) = (config.parent / "runs").rglob("responses.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    held_out = cli.datamodule.test_dataloader().dataset
    assert [row["row"] for row in rows] == sorted(held_out[i].row for i in range(len(held_out)))
    for row in rows:
        ((role, text),) = ((turn["role"], turn["content"]) for turn in row["prompt"])
        assert role == "user"
        assert text.startswith(f"{row['row']}: ")
    assert all(isinstance(row["response"], str) for row in rows)
    assert file.parent.parent.name == "runs"
    assert not (config.parent / "runs" / ".unfinished").exists()


def test_responses_may_hold_any_character(config, monkeypatch):
    """Some characters end lines for Python, but not for jsonl."""
    odd = "one\u2028two\u0085three"
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *_, **__: odd)
    run(["predict", "--config", str(config)])
    (file,) = (config.parent / "runs").rglob("responses.jsonl")
    with file.open(encoding="utf-8") as lines:
        assert all(json.loads(line)["response"] == odd for line in lines)


def test_validation_within_a_step_is_refused(message):
    error = message("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=0.5")
    assert "val_check_interval" in error
    assert "multiple of trainer.accumulate_grad_batches" in error


def test_what_a_run_stands_on_is_logged(config):
    cli = run(["fit", "--config", str(config)])
    logged = yaml.safe_load((Path(cli.trainer.log_dir) / "hparams.yaml").read_text())
    assert logged["fingerprint"] == cli.datamodule.pairs.fingerprint
    assert logged["base_fingerprint"] == cli.model.base_fingerprint
    assert logged["torch"].startswith(torch.__version__.split("+")[0])


def test_a_run_in_the_same_folder_is_a_new_version(config):
    first, second = (run(["fit", "--config", str(config)]) for _ in range(2))
    assert first.trainer.log_dir != second.trainer.log_dir
    for cli in (first, second):
        folder = Path(cli.trainer.log_dir)
        assert (folder / "config.yaml").exists()
        assert (folder / "metrics.csv").exists()
        assert list(folder.glob("events.out.tfevents*"))


@pytest.mark.slow
def test_the_console_script_ends_with_status_0(config):
    command = Path(sys.executable).with_name("rotopo")
    done = subprocess.run(
        [command, "validate", "--config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "loss, nats" in done.stdout
    assert "object at" not in done.stdout + done.stderr
