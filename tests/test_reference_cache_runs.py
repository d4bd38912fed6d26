"""Runs with the reference from the cache: the numbers of runs without, in every combination."""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig

from rotopo.cli import run
from rotopo.data.batch import collate
from rotopo.errors import InputError
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.objectives import DPO
from tests.objectives.trl_side import real_model_and_pairs
from tests.small_run import save_config
from tests.test_training import EXACT, assert_equal, fit, weights

CACHED = "--model.policy.reference=cached"


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer, monkeypatch) -> Path:
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path / "home"))
    return save_config(tmp_path, tiny_tokenizer)


def log_of(cli) -> pd.DataFrame:
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    return log[[c for c in log if c.startswith(("train/", "val/"))]]


@pytest.fixture
def reference_passes(monkeypatch):
    """How many times the reference has been asked."""
    original, calls = Policy.reference_model, []

    def counted(self):
        calls.append(1)
        return original(self)

    monkeypatch.setattr(Policy, "reference_model", counted)
    return calls


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
@pytest.mark.parametrize(
    "objective", ["DPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("KTO", "SamPO"))]
)
def test_cached_runs_are_online_runs(config, objective, layout):
    options = [*EXACT, f"--model={objective}", f"--data.layout={layout}"]
    online = fit(config, "online", *options)
    cached = fit(config, "cached", *options, CACHED)
    assert_equal(weights(cached), weights(online), rtol=1e-7, atol=1e-10)
    pd.testing.assert_frame_equal(log_of(cached), log_of(online), rtol=1e-6, atol=1e-9)


def test_so_are_those_of_full_fine_tuning(config):
    options = ["--model.policy={adapter: null, dtype: float64}", "--trainer.max_epochs=1"]
    online = fit(config, "online", *options)
    cached = fit(config, "cached", *options, CACHED)
    assert_equal(weights(cached), weights(online), rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_the_reference_is_asked_once_for_all_runs_objectives_and_layouts(config, reference_passes):
    fit(config, "first", CACHED)
    assert reference_passes
    reference_passes.clear()
    fit(config, "again", CACHED, "--data.layout=padded")
    fit(config, "other", CACHED, "--model=IPO", "--data.pairs_per_step=4", "--data.seed=0")
    run(["validate", "--config", str(config), CACHED])
    assert not reference_passes
    run(["test", "--config", str(config), CACHED])  # compares distributions, which no cache holds
    assert len(reference_passes) == 1


def test_a_split_that_there_is_not_has_nothing_to_cache(config):
    options = [*EXACT, "--data.validation=0", "--trainer.max_epochs=1"]
    cached, online = fit(config, "cached", CACHED, *options), fit(config, "online", *options)
    assert_equal(weights(cached), weights(online), rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_auto_caches_what_will_all_be_seen(config, reference_passes):
    auto = "--model.policy.reference=auto"
    fit(config, "short", auto, "--trainer.max_steps=2")
    fit(config, "limited", auto, "--trainer.limit_train_batches=2")
    fit(config, "one batch", auto, "--trainer.limit_train_batches=1")
    fit(config, "kl", auto, "--model=TYPO", "--model.sample_tokens=4")
    assert not list((config.parent / "home").rglob("*.arrow"))
    fit(config, "whole", auto)
    assert list((config.parent / "home").rglob("*.arrow"))


def test_a_model_that_is_refused_leaves_nothing_behind(config, monkeypatch, capsys):
    """Or the other layout, which the message asks for, would find what the first one got wrong."""
    monkeypatch.setattr(Policy, "_check", Mock(side_effect=InputError("not this family")))
    with pytest.raises(SystemExit):
        fit(config, "refused", CACHED)
    assert "not this family" in capsys.readouterr().err
    assert not list((config.parent / "home").rglob("*.arrow"))


@pytest.mark.slow
def test_the_same_weights_under_another_configuration_are_another_reference(config):
    fit(config, "first", *EXACT, CACHED)
    file = config.parent / "model" / "config.json"
    settings = json.loads(file.read_text())
    settings["rope_parameters"]["rope_theta"] = 10.0
    file.write_text(json.dumps(settings))
    online, cached = (fit(config, name, *EXACT, *o) for name, o in (("o", []), ("c", [CACHED])))
    pd.testing.assert_frame_equal(log_of(cached), log_of(online), rtol=1e-6, atol=1e-9)


def test_a_precision_that_casts_has_a_cache_of_its_own(config):
    options = ["--trainer.precision=bf16-mixed", "--model.optimizer.lr=0", CACHED]
    fit(config, "float32", CACHED)
    log = log_of(fit(config, "mixed", *options, "--model.policy.adapter.lora_dropout=0"))
    assert len(list((config.parent / "home" / "reference").iterdir())) == 2
    assert log["train/loss"].dropna().map(lambda loss: abs(loss - math.log(2)) < 1e-2).all()


@pytest.mark.slow
def test_two_ranks_fill_one_cache_and_miss_nothing(config):
    """Every response is in the files, once the run is over, and the numbers are one rank's."""
    command = [Path(sys.executable).with_name("rotopo"), "fit", f"--config={config}", *EXACT]
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", CACHED]
    root = f"--trainer.default_root_dir={config.parent / 'two'}"
    done = subprocess.run([*command, *ranks, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = fit(config, "one", *EXACT)
    two = pd.read_csv(next((config.parent / "two").rglob("metrics.csv")))
    expected = log_of(one)
    pd.testing.assert_frame_equal(two[expected.columns], expected, rtol=1e-6, atol=1e-9)
    keys = [
        key
        for file in (config.parent / "home").rglob("*.arrow")
        for key in pa.ipc.open_file(str(file)).read_all().column("key").to_pylist()
    ]
    pairs = one.datamodule.pairs.describe()
    assert len(set(keys)) == 2 * (pairs["pairs/train"] + pairs["pairs/validation"])


def test_a_folder_that_nothing_would_use_is_refused(config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(config, "first", f"--model.policy.reference_cache={tmp_path / 'mine'}")
    assert "policy.reference is 'online' and uses none" in capsys.readouterr().err


def test_a_kl_cannot_come_from_the_cache(config, capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config), CACHED, "--model=TYPO", "--model.sample_tokens=4"])
    assert "policy.reference is 'cached', but TYPO" in capsys.readouterr().err


def test_the_cache_can_be_named_and_belongs_to_its_model(config, tmp_path, capsys):
    named = f"--model.policy.reference_cache={tmp_path / 'mine'}"
    fit(config, "first", CACHED, named)
    assert list((tmp_path / "mine").glob("*.arrow"))
    with pytest.raises(SystemExit):
        fit(config, "other", CACHED, named, "--model.policy.dtype=float64")
    assert "another model" in capsys.readouterr().err


@pytest.mark.slow
def test_in_bfloat16_a_cached_loss_differs_no_more_than_online_ones_of_other_batches(tmp_path):
    """Cached, a pair's reference comes from a batch of other pairs than its policy does."""
    model, tokenizer, rows = real_model_and_pairs(step=300)
    rows = rows[:8]
    model.to(torch.bfloat16).set_attn_implementation("segments")
    config = PolicyConfig(adapter=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    policy = Policy.build(model, config, needs_reference=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    together, alone = [[*range(8)]], [[i] for i in range(8)]

    def batches(parts, layout):
        for part in parts:
            yield collate([rows[i] for i in part], tokenizer.pad_token_id, layout, 1.0)

    @torch.no_grad()
    def losses(parts, layout):
        found = [DPO(0.1).losses(policy(batch)) for batch in batches(parts, layout)]
        return torch.cat(found)

    def largest(a, b):
        return (a - b).abs().max()

    online = {layout: losses(together, layout) for layout in ("padded", "packed")}
    spread = largest(online["padded"], losses(alone, "padded"))
    own_spread = largest(online["packed"], losses(alone, "packed"))
    policy.open_cache(str(tmp_path))
    policy.cache_reference(batches(alone, "packed"))
    difference = largest(losses(together, "packed"), online["packed"])
    print(f"cached {difference:.2g}, online packed {own_spread:.2g}, padded {spread:.2g}")
    # With AMX each of the three is .04 to .053, another one in each run: one kind of rounding.
    assert difference <= 2 * max(spread, own_spread)
    assert largest(online["packed"], torch.tensor(math.log(2))) > 0.01
