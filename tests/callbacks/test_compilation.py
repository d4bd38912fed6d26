"""``compile: auto``: decided by the settings of a whole fit, and then kept."""

import shutil

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rotopo.errors import InputError
from rotopo.models import compilation
from rotopo.models.settings import PolicyConfig
from rotopo.run import checkpoints
from tests.models.families import make
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, fit, last_checkpoint

LORA = LoraConfig(target_modules=["q_proj"])


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture
def compiler(monkeypatch):
    """As if there were one; what it is asked to compile stays as it is, and is listed."""
    asked = []
    monkeypatch.setenv("CXX", "there")
    monkeypatch.setattr(nn.Module, "compile", lambda layer, dynamic: asked.append(layer))
    return asked


def reason(family="llama", steps=1e9, tokens=1e4, **settings) -> str:
    config = PolicyConfig(adapter=LORA, **settings)
    return compilation.why_not(config, make(family, torch.float32), steps, tokens)


def test_more_work_is_never_less_worth_compiling(compiler):
    worth = [not reason(steps=10.0**n) for n in range(10)]
    assert worth == sorted(worth)
    assert worth[0] is False
    assert worth[-1] is True
    assert reason(steps=float("inf")) == ""
    assert "40 steps would not win back" in reason(steps=40)


def test_what_cannot_be_compiled_is_left_out(compiler, monkeypatch):
    assert "quantised" in reason(quantize="4bit")
    assert "flex_attention" in reason(attention="flex_attention")
    assert "mixtral has not been tried" in reason("mixtral")
    assert "has not been tried" in reason(trust_remote_code=True)
    model = make("llama", torch.float32)
    model._no_split_modules = None
    assert "does not name its layers" in compilation.obstacle(model)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in reason()
    with pytest.raises(InputError, match=r"policy\.compile: .* C\+\+ compiler.*set it to false"):
        compilation.compile_layers(model, "policy")


def test_small_runs_are_left_uncompiled_and_stay_so(config, compiler, caplog, monkeypatch):
    with caplog.at_level("INFO"):
        cli = fit(config, "small", *CHECKPOINTS)
    assert not compiler
    assert "compile: off, 6 steps would not win back" in caplog.text
    last = last_checkpoint(config.parent / "small")
    assert checkpoints.read(last)["compiled"] is False
    assert not cli.model.backbone.compiled
    monkeypatch.setattr(compilation, "_COMPILING", 0.0)
    longer = ["--trainer.max_epochs=3", "--model.scheduler.total_steps=9"]
    fit(config, "resumed", f"--ckpt_path={last}", *longer)
    assert not compiler


@pytest.mark.slow
def test_a_run_goes_on_as_it_began(config, compiler, monkeypatch):
    """Whatever the rule would say by then; unless the setting is no longer ``auto``."""
    monkeypatch.setattr(compilation, "_COMPILING", 0.0)
    own = [*CHECKPOINTS, "--model.scheduler=null"]  # no schedule, whose length would change
    cli = fit(config, "compiled", *own, "--trainer.max_steps=4")
    assert compiler == list(cli.model.language_model.model.layers)
    last = last_checkpoint(config.parent / "compiled")
    assert checkpoints.read(last)["compiled"] is True

    monkeypatch.undo()
    asked = []
    monkeypatch.setenv("CXX", "there")
    monkeypatch.setattr(nn.Module, "compile", lambda layer, dynamic: asked.append(layer))
    resumed = fit(config, "resumed", *own, f"--ckpt_path={last}")
    assert asked == list(resumed.model.language_model.model.layers)
    asked.clear()
    fit(config, "off", *own, f"--ckpt_path={last}", "--model.policy.compile=false")
    assert not asked


@pytest.mark.slow
def test_reward_models_follow_the_same_rule(config, compiler, monkeypatch):
    monkeypatch.setattr(compilation, "_COMPILING", 0.0)
    path = config.parent / "model"
    cli = fit(
        config,
        "reward",
        "--model=rotopo.reward.RewardModule",
        f"--model.backbone.path={path}",
        "--model.backbone.dtype=float32",
        "--trainer.max_steps=1",
    )
    assert compiler == list(cli.model.language_model.model.layers)
