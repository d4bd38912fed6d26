"""Checkpoints and the settings that they hold, through the command line."""

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from rotopo.cli import run
from rotopo.errors import InputError
from rotopo.objectives import DPO
from rotopo.run.adapters import refuse_another
from rotopo.run.changed import TABLE
from rotopo.run.checkpoints import read
from rotopo.run.settings import differences, for_command, leaves, named_checkpoint
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, assert_equal, fit, weights

STOPPING = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.patience=90",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_tokenizer_dir):
    """The configuration and the checkpoints of a run of six steps."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    config = save_config(tmp_path_factory.mktemp("trained"), tokenizer)
    fit(config, "run", *CHECKPOINTS, *STOPPING)
    return config, config.parent / "run" / "version_0" / "checkpoints"


@pytest.fixture
def config(trained) -> Path:
    return trained[0]


@pytest.fixture
def third(trained) -> str:
    """The option that names the checkpoint of step 3."""
    (file,) = trained[1].glob("*step=3.ckpt")
    return f"--ckpt_path={file}"


@pytest.fixture
def again(config, trained, third):
    """Goes on from step 3."""
    return lambda root, *options: fit(config, root, *CHECKPOINTS, *STOPPING, third, *options)


@pytest.fixture
def says(capsys):
    def refused(*command: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run([str(one) for one in command])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return refused


def test_a_checkpoint_holds_its_settings_and_its_adapter(trained):
    ours = torch.load(trained[1] / "last.ckpt", weights_only=True)["rotopo"]
    written = yaml.safe_load((trained[1].parent / "config.yaml").read_text())
    written.pop("ckpt_path")
    assert ours["settings"] == {k: v for k, v in written.items() if k in ours["settings"]}
    assert ours["settings"].keys() == {"seed_everything", "trainer", "model", "data"}
    lora = peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj"])
    expected = json.loads(json.dumps(lora.to_dict(), default=sorted))
    for name, value in ours["adapter"].items():
        if name not in ("base_model_name_or_path", "peft_version", "task_type"):
            assert value == expected[name], name


def test_a_checkpoint_alone_is_tested_as_it_was_trained(config, third, tmp_path):
    own = run(["test", "--config", str(config), third])
    alone = run(["test", third, f"--trainer.default_root_dir={tmp_path}"])
    assert alone.trainer.callback_metrics == own.trainer.callback_metrics
    assert_equal(weights(alone), weights(own), rtol=0, atol=0)
    assert alone.model.beta == 0.3
    assert alone.trainer.log_dir.startswith(str(tmp_path))
    other = run(["test", third, "--data.eval_pairs_per_batch=2", "--data.test=0.5"])
    assert other.datamodule.batching.eval_pairs_per_batch == 2
    assert len(other.datamodule.rows("test")) == 20


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.policy.adapter.lora_alpha=64", "adapter.lora_alpha is 64 here and 8 in the"),
        ("--model.beta=0.1", "model.beta is 0.1 here and 0.3 in the checkpoint"),
        ("--model=SimPO", "model is rotopo.objectives.SimPO here and rotopo.objectives.DPO in the"),
        ("--model.policy={adapter: null}", "model.policy.adapter is null here and peft.LoraConfig"),
    ],
)
def test_what_was_trained_is_refused_under_another_setting(says, config, third, option, expected):
    assert expected in says("test", third, option)
    assert expected in says("predict", "--config", config, third, option)


def test_the_base_may_have_moved(config, third, tmp_path):
    moved = Path(shutil.copytree(config.parent / "model", tmp_path / "moved"))
    found = run(["validate", third, f"--model.policy.path={moved}"])
    whole = run(["validate", third])
    assert found.trainer.callback_metrics == whole.trainer.callback_metrics


def test_a_fit_goes_on_from_a_checkpoint_alone(trained, third, config):
    cli = run(["fit", third, f"--trainer.default_root_dir={config.parent / 'alone'}"])
    end = read(trained[1] / "last.ckpt", mmap=False)
    assert cli.trainer.global_step == 6
    assert_equal(weights(cli), end["state_dict"], rtol=0, atol=0)
    kept = read(Path(cli.trainer.checkpoint_callback.last_model_path))["rotopo"]["settings"]
    changed = differences(kept, end["rotopo"]["settings"])
    assert [one.name for one in changed] == ["trainer.default_root_dir"]


def test_a_changed_setting_counts_from_the_next_step_and_is_said(config, again, caplog):
    """Against the formulas: cosine from step 1 of 6, and DPO's loss at another beta."""
    options = {"optimizer.lr": 0.001, "optimizer.weight_decay": 0.5, "beta": 0.1}
    first: dict[str, float] = {}

    start = DPO.on_train_batch_start

    def seen(self, *args):
        start(self, *args)
        first.setdefault("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(DPO, "on_train_batch_start", seen)
        cli = again("changed", *(f"--model.{name}={value}" for name, value in options.items()))
    assert first["lr"] == pytest.approx(0.001 * 0.5 * (1 + math.cos(math.pi * 2 / 5)))
    (group,) = cli.trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.5
    for name, value in options.items():
        assert f"ckpt_path: model.{name} is {value} from the next step on" in caplog.text
    assert "lr 0.006545 -> 0.0006545" in caplog.text
    written = yaml.safe_load((Path(cli.trainer.log_dir) / "config.yaml").read_text())
    flat = leaves(written)
    assert {name: flat[f"model.{name}"] for name in options} == options


TRAINER = {
    "max_epochs": (3, lambda t: t.max_epochs),
    "min_epochs": (2, lambda t: t.min_epochs),
    "max_steps": (8, lambda t: t.max_steps),
    "min_steps": (7, lambda t: t.min_steps),
    "max_time": ("00:01:00:00", lambda t: timer(t)),
    "limit_val_batches": (2, lambda t: t.limit_val_batches),
    "limit_train_batches": (2, lambda t: t.num_training_batches),
    "val_check_interval": (2, lambda t: t.val_check_batch),
    "check_val_every_n_epoch": (2, lambda t: t.check_val_every_n_epoch),
    "gradient_clip_val": (0.25, lambda t: t.gradient_clip_val),
    "gradient_clip_algorithm": ("value", lambda t: t.gradient_clip_algorithm),
    "precision": ("bf16-mixed", lambda t: t.precision),
    "accumulate_grad_batches": (2, lambda t: t.accumulate_grad_batches),
    "overfit_batches": (2, lambda t: t.overfit_batches),
}


def timer(trainer) -> str:
    (found,) = (one for one in trainer.callbacks if isinstance(one, Timer))
    return f"00:0{int(found.time_remaining() // 3600) + 1}:00:00"


def test_what_the_trainer_is_given_counts(again):
    names = {n for row in TABLE if row.fit == "applied" for n in row.names}
    names = {n.removeprefix("trainer.") for n in names if n.startswith("trainer.")}
    assert names == {*TRAINER, "callbacks", "callbacks.*"}
    apart = ("overfit_batches", "accumulate_grad_batches")
    given = {name: value for name, (value, _) in TRAINER.items() if name not in apart}
    options = [f"--trainer.{name}={value}" for name, value in given.items()]
    lengths = ["--model.scheduler.total_steps=8", "--data.eval_pairs_per_batch=2"]
    runs = dict.fromkeys(given, again("trainer", *options, *lengths))
    for name in apart:
        extra = f"--trainer.{name}={TRAINER[name][0]}"
        runs[name] = again(name, extra, *lengths)
    for name, (value, observed) in TRAINER.items():
        assert observed(runs[name].trainer) == value, name


def test_what_callbacks_are_given_counts(config, third):
    """Lightning restores a patience, too."""
    keeper = [*CHECKPOINTS[:2], "--trainer.callbacks.save_top_k=2"]
    stopping = [*STOPPING[:2], "--trainer.callbacks.patience=70"]
    cli = fit(config, "few", *keeper, "--trainer.callbacks.monitor=val/loss", *stopping, third)
    kept = cli.trainer.checkpoint_callback
    assert isinstance(kept, ModelCheckpoint)
    assert len(kept.best_k_models) == 2
    (stop,) = (one for one in cli.trainer.callbacks if isinstance(one, EarlyStopping))
    assert stop.patience == 70


def test_a_longer_run_has_to_say_how_long_its_schedule_is(again, says, config, third):
    longer = "--trainer.max_epochs=4"
    message = says("fit", "--config", config, third, longer)
    for part in ("0.006545 at step 3", "0 at step 6", "0.009755 at the next", "total_steps 12"):
        assert part in message
    flat = ["--model.scheduler.total_steps=12", longer]
    assert again("asked", *flat).trainer.global_step == 12


def test_other_classes_are_refused(says, config, third):
    def refused(option):
        return says("fit", "--config", config, third, option)

    assert "model.optimizer is torch.optim.SGD here" in refused("--model.optimizer=SGD")
    assert "model.scheduler is null here" in refused("--model.scheduler=null")
    assert "adapter.lora_alpha is 64 here" in refused("--model.policy.adapter.lora_alpha=64")
    assert "data.validation is 0.1 here and 0.2 in" in refused("--data.validation=0.1")


def test_a_checkpoint_of_an_earlier_release_takes_what_is_given(
    config, trained, tmp_path, caplog, says
):
    checkpoint = torch.load(next(trained[1].glob("*step=3.ckpt")), weights_only=True)
    for name in ("settings", "adapter", "optimization"):
        del checkpoint["rotopo"][name]
    file = tmp_path / "old.ckpt"
    torch.save(checkpoint, file)
    old = f"--ckpt_path={file}"
    with caplog.at_level("INFO"):
        same = fit(config, "old", old)
    assert "holds no settings (an earlier release" in caplog.text
    assert "the optimiser has" not in caplog.text
    end = read(trained[1] / "last.ckpt", mmap=False)
    assert_equal(weights(same), end["state_dict"], rtol=0, atol=0)
    with caplog.at_level("INFO"):
        fit(config, "old", old, "--model.optimizer.lr=0.001")
    assert "lr 0.006545 -> 0.0006545" in caplog.text
    assert "total_steps" in says("fit", "--config", config, old, "--trainer.max_epochs=4")
    assert "give those that it was trained with" in says("test", old)


# From Python there are no settings, and the adapter's configuration is compared all the same.


def adapted(config, kind=peft.LoraConfig, **settings):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.parent / "model")
    return peft.get_peft_model(base, kind(**settings))


def test_another_adapter_is_refused_by_name(config, trained):
    there = torch.load(trained[1] / "last.ckpt", weights_only=True)["rotopo"]["adapter"]
    own = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.2}

    def load(fits=False, **settings):
        refuse_another(there, adapted(config, **settings), "policy.adapter", fits)

    load(**own, fits=True)
    load(**own | {"lora_dropout": 0.0, "task_type": "CAUSAL_LM"})
    with pytest.raises(InputError, match=r"policy\.adapter\.lora_alpha is 64 here and 8 in the"):
        load(**own, lora_alpha=64)
    with pytest.raises(InputError, match="use_rslora is True here and False"):
        load(**own, use_rslora=True)
    with pytest.raises(InputError, match="lora_dropout"):
        load(**own | {"lora_dropout": 0.0}, fits=True)
    with pytest.raises(InputError, match="peft_type is OFT here and LORA"):
        load(kind=peft.OFTConfig, target_modules=["q_proj"])
    with pytest.raises(InputError, match="is null here and LORA in the"):
        refuse_another(there, torch.nn.Linear(1, 1), "policy.adapter", False)


def test_layers_that_peft_has_found_itself_compare_as_they_are(config):
    from rotopo.run.adapters import configuration, other_places

    every = adapted(config, target_modules="all-linear")
    refuse_another(configuration(every), adapted(config, target_modules="all-linear"), "x", True)
    assert configuration(every)["target_modules"] == sorted(configuration(every)["target_modules"])
    one = adapted(config, target_modules=["q_proj"])
    assert "x.target_modules is ['q_proj'] here and [" in other_places(
        configuration(every), one, "x"
    )


def test_settings_are_compared_by_what_they_mean():
    here = {"trainer": {"callbacks": {"class_path": "a.B", "init_args": {"x": 1}}}}
    there = {"trainer": {"callbacks": [{"class_path": "a.B", "init_args": {"x": 2}}]}}
    assert [str(one) for one in differences(here, there)] == [
        "trainer.callbacks.B.x is 1 here and 2 in the checkpoint"
    ]
    here = {"model": {"class_path": "rotopo.training.Warmup", "init_args": {}}}
    there = {"model": {"class_path": "rotopo.optimisers.Warmup", "init_args": {"new": 1}}}
    assert differences(here, there) == []
    assert differences({"data": {"columns": {"a": 1}}}, {"data": {"columns": {}}})


def test_consent_to_run_a_models_code_is_not_a_checkpoints(trained):
    settings = read(trained[1] / "last.ckpt")["rotopo"]["settings"]
    settings["model"]["init_args"]["policy"]["trust_remote_code"] = True
    taken = for_command("test", {"settings": settings})
    assert "trust_remote_code" not in taken["model"]["init_args"]["policy"]
    assert settings["model"]["init_args"]["policy"]["trust_remote_code"]


def test_the_last_checkpoint_that_is_named_counts(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("ckpt_path: a.ckpt")
    assert named_checkpoint(["--config", str(file)]) == ("a.ckpt", True)
    assert named_checkpoint(["-c", str(file), "--ckpt_path", "b.ckpt"]) == ("b.ckpt", True)
    assert named_checkpoint(["--ckpt_path=b.ckpt"]) == ("b.ckpt", False)
    assert named_checkpoint(["--ckpt_path=null"]) == (None, False)
