"""The noise study on a tiny language model: what comes out, and going on after an interruption."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from rotopo.cli import run
from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import ROPO
from rotopo.robust import Alternation
from rotopo.studies import noise
from rotopo.studies.noise_language_model import LanguageModel, LanguageModelRuns, dpo_at_rate_0
from rotopo.studies.noise_methods import Method
from tests.small_run import save_config
from tests.test_training import Killed

pytestmark = pytest.mark.slow

SEED = "--seeds=4"
METHOD = Method.named("ROPO")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_tokenizer_dir) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("noise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROTOPO_CACHE", str(folder / "home"))
        yield save_config(folder, PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir))


def study(config: Path, output: Path, *options: str) -> pd.DataFrame:
    """The command on the tiny model: the results."""
    arguments = [f"--output={output}", "--task=language_model"]
    arguments += [f"--language_model.configs=[{config}]", "--language_model.rounds=2"]
    arguments += ["--language_model.epochs=2", "--language_model.max_new_tokens=4"]
    noise.main([*arguments, *options])
    return pd.read_csv(output / "results.csv")


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> Path:
    """The output of two methods at two rates."""
    output = tmp_path_factory.mktemp("study")
    study(config, output, "--objective=[DPO,ROPO+filter+sampling]", "--noise=[0.2,0.4]", SEED)
    return output


def run_in(output: Path, name: str) -> Path:
    (folder,) = (output / "language_model").glob(f"{name}-????????")
    return folder


def pairs_in(run: Path) -> pd.DataFrame:
    return pd.read_csv(next(run.rglob("pairs.csv"))).set_index("row")


def test_a_study_writes_its_tables_and_keeps_no_checkpoints(done):
    table = pd.read_csv(done / "results.csv")
    assert list(table) == ["task", "objective", "noise", "seed", "accuracy", "auroc", "recall"]
    assert len(table) == 4
    measures = table[["accuracy", "auroc", "recall"]]
    assert ((measures >= 0) & (measures <= 1)).all(axis=None)
    rounds = pd.read_csv(done / "rounds.csv")
    assert rounds["round"].tolist() == [1, 1]
    assert rounds["dropped"].tolist() == [round(0.2 * 20)] * 2
    assert rounds["right"].isna().all()
    assert (done / "noise.png").exists()
    assert not list(done.rglob("*.ckpt"))


def test_what_is_measured(done):
    """Against the held-out pairs' scores on disk, and what the table of rounds says of flips."""
    table = pd.read_csv(done / "results.csv").set_index(["objective", "noise"])
    for (objective, rate), row in table.iterrows():
        run = run_in(done, f"{objective}-{rate}-4")
        tested = pd.read_json(next(run.rglob("test_pairs.jsonl")), lines=True)
        assert row.accuracy == pytest.approx((tested.chosen_score > tested.rejected_score).mean())
    run = run_in(done, "ROPO+filter+sampling-0.4-4")
    outcome, pairs = json.loads((run / "outcome.json").read_text()), pairs_in(run)
    assert (outcome["pairs"], outcome["flipped"]) == (len(pairs), pairs.flipped.sum())
    assert outcome["rounds"][0]["flipped"] == pairs[pairs.weight == 0].flipped.sum()
    assert outcome["rounds"][0]["accepted"] == (pairs.outcome == "accepted").sum()


def test_the_margins_that_flips_are_looked_for_in_are_those_of_the_last_weights(config, tmp_path):
    """As the callback finds them in the same training, at its end."""
    watch = ["--trainer.callbacks+=rotopo.robust.NoiseDetection"]
    arguments = LanguageModelRuns(LanguageModel(), tmp_path)._arguments(METHOD, 0.4, 4)
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=2", *watch]
    cli = run(["fit", f"--config={config}", *arguments])
    expected = {name: cli.trainer.callback_metrics[f"noise/{name}"] for name in ("auroc", "fitted")}
    study(config, tmp_path, "--objective=ROPO", "--noise=0.4", SEED)
    found = json.loads((run_in(tmp_path, "ROPO-0.4-4") / "outcome.json").read_text())["detection"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6)


def test_all_methods_start_alike_and_higher_rates_flip_more(done):
    low, high = (pairs_in(run_in(done, f"ROPO+filter+sampling-{r}-4")) for r in (0.2, 0.4))
    assert low.index.equals(high.index)
    assert (low.flipped <= high.flipped).all()
    assert low.flipped.sum() < high.flipped.sum()
    # The first step of each: chosen and rejected together, which a flip only exchanges.
    logs = [pd.read_csv(file).iloc[0] for file in done.rglob("metrics.csv")]
    values = [log["train/logps/chosen"] + log["train/logps/rejected"] for log in logs]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_what_is_done_is_not_done_again_and_what_was_cut_short_goes_on(
    config, done, tmp_path, monkeypatch
):
    options = ["--objective=ROPO+filter", "--noise=0.4", "--seeds=5"]
    whole = study(config, tmp_path / "whole", *options)
    rows = pairs_in(run_in(tmp_path / "whole", "ROPO+filter-0.4-5")).index
    assert set(rows) != set(pairs_in(run_in(done, "ROPO+filter+sampling-0.4-4")).index)

    def killed(*_, **__):
        raise Killed

    output = tmp_path / "cut"
    for place, name in (
        (Alternation, "_decide"),  # in the midst of training
        (Trainer, "test"),  # behind its last checkpoint
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killed)
            with pytest.raises(Killed):
                study(config, output, *options)
        assert not (output / "results.csv").exists()
    steps = []
    original = ROPO.training_step

    def counted(self, batch, batch_idx):
        steps.append(batch_idx)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ROPO, "training_step", counted)
    pd.testing.assert_frame_equal(study(config, output, *options), whole)
    assert not steps
    monkeypatch.setattr(LanguageModelRuns, "_trained_and_tested", killed)
    pd.testing.assert_frame_equal(study(config, output, *options), whole)
    with pytest.raises(Killed):
        study(config, output, *options[:2], SEED)


def test_other_settings_are_another_run(config, done, tmp_path, monkeypatch):
    def fake(*_):
        return {"accuracy": 0.5, "detection": {}, "rounds": []}

    monkeypatch.setattr(LanguageModelRuns, "_trained_and_tested", fake)
    options = ["--objective=ROPO+filter", "--noise=0.3", SEED]
    changed = tmp_path / "config.yaml"
    changed.write_text(config.read_text())
    study(changed, tmp_path, *options)
    study(changed, tmp_path, *options, "--language_model.beta=0.5")
    settings = yaml.safe_load(changed.read_text())
    settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.02
    changed.write_text(yaml.safe_dump(settings))
    study(changed, tmp_path, *options)
    assert len(list((tmp_path / "language_model").iterdir())) == 3


def test_at_a_rate_of_0_cdpo_and_rdpo_are_dpo(config, tmp_path):
    names = ("DPO", "cDPO", "RobustDPO")
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(50, generator=generator) * 30 for _ in range(4)]
    lengths = torch.ones(50, dtype=torch.long)
    log_probs = PairLogProbs(values[0], values[1], lengths, lengths, values[2], values[3])
    losses = [Method.named(name).build(0.0, beta=0.1).losses(log_probs) for name in names]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    output = tmp_path / "study"
    table = study(config, output, f"--objective=[{','.join(names)}]", "--noise=0", SEED)
    assert len(table) == 3
    assert table.accuracy.nunique() == 1
    assert table[["auroc", "recall"]].isna().all(axis=None)
    (only,) = (output / "language_model").iterdir()
    assert only.name.startswith("DPO-0-4-")
    assert dpo_at_rate_0(Method.named("cDPO+filter")) == Method.named("DPO+filter")
    assert dpo_at_rate_0(Method.named("ROPO+filter")) == Method.named("ROPO+filter")


def test_the_command_is_told_the_true_rate(tmp_path):
    runs = LanguageModelRuns(LanguageModel(), tmp_path)
    assert "--model.label_smoothing=0.4" in runs._arguments(Method.named("cDPO"), 0.4, 0)
    assert "--model.flip_rate=0.2" in runs._arguments(Method.named("RobustDPO"), 0.2, 0)
    assert not any("smoothing" in a for a in runs._arguments(Method.named("DPO"), 0.4, 0))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--language_model.configs=[nowhere.yaml]", "nowhere.yaml"),
        ("--language_model.epochs=3", "divide evenly"),
        ("--language_model.rho=1", "rho is 1"),
        ("--objective=DrDPO+filter", "leave the filter out"),
        ("--objective=Mixture", "defaults"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(option, expected, config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        study(config, tmp_path / "study", option)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_what_the_command_refuses_is_told(config, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        study(config, tmp_path / "study", "--objective=TPO", "--noise=0.2", SEED)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert "gold" in error
    assert "Traceback" not in error


def test_the_repositorys_files_are_there():
    assert all(file.is_file() for file in LanguageModel().files)
