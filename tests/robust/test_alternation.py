"""ROPO's alternation through the command line: what is trained on, and resumption anywhere."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedTokenizerFast

from rotopo.cli import run
from rotopo.data.batch import Role
from rotopo.models import samples
from rotopo.objectives import DPO, ROPO
from rotopo.robust import alternation, resampling
from rotopo.robust.decisions import Decision
from rotopo.robust.resampling import NewPair
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config
from tests.test_training import (
    CHECKPOINTS,
    EXACT,
    Kill,
    Killed,
    assert_equal,
    fit,
    last_checkpoint,
    weights,
)

FILTER = [
    "--trainer.callbacks+=rotopo.robust.Alternation",
    "--trainer.callbacks.rho=0.3",
    "--trainer.max_epochs=3",
]
LONG = [
    "--trainer.callbacks.resampling={max_new_tokens: 200}",
    "--trainer.accumulate_grad_batches=6",
]
SAMPLES = ["--trainer.callbacks.resampling={samples: 3, max_new_tokens: 4, quantile: 0.9}"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def tables(cli) -> dict[str, str]:
    folder = Path(cli.trainer.log_dir) / "rounds"
    return {file.name: file.read_text() for file in sorted(folder.iterdir())}


def pairs(cli) -> pd.DataFrame:
    return pd.read_csv(Path(cli.trainer.log_dir) / "rounds" / "pairs.csv")


def test_rho_0_is_plain_training(config):
    plain = fit(config, "plain", "--trainer.max_epochs=3")
    filtered = fit(config, "filtered", *FILTER, "--trainer.callbacks.rho=0")
    assert_equal(weights(filtered), weights(plain), rtol=0, atol=0)
    assert (pairs(filtered).weight == 1).all()


def test_the_pairs_of_smallest_loss_are_trained_on(config, monkeypatch):
    trained: list[set[int]] = []
    original = DPO.training_step

    def step(self, batch, batch_idx):
        while len(trained) <= self.trainer.current_epoch:
            trained.append(set())
        trained[-1] |= set(batch.rows.tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DPO, "training_step", step)
    run = fit(
        config,
        "filtered",
        *FILTER,
        "--data.pairs_per_step=1",
        "--trainer.max_epochs=6",
        "--trainer.callbacks.epochs_per_round=2",
    )
    table = pairs(run)
    n = len(run.datamodule.rows("train"))
    assert table.groupby("round").size().to_list() == [n, n]
    assert trained[0] == trained[1] == set(table.row)
    for round_, epochs in ((1, (2, 3)), (2, (4, 5))):
        here = table[table["round"] == round_]
        assert here.weight.sum() == round(0.7 * n)
        assert here[here.weight == 1].loss.max() <= here[here.weight == 0].loss.min()
        np.testing.assert_allclose(here.loss, np.logaddexp(0, -here.margin), rtol=1e-5)
        for epoch in epochs:
            assert trained[epoch] == set(here[here.weight == 1].row)
    log = pd.read_csv(Path(run.trainer.log_dir) / "metrics.csv")
    assert log["round/kept"].dropna().tolist() == [round(0.7 * n)] * 2


def test_flipped_labels_are_counted_where_they_are_known(config):
    noise = ["--data.noise=SymmetricFlips", "--data.noise.rate=0.3", "--data.noise.seed=1"]
    run = fit(config, "noisy", *FILTER, *noise)
    table, flipped = pairs(run), run.datamodule.pairs.flipped()
    rounds = json.loads((Path(run.trainer.log_dir) / "rounds" / "rounds.json").read_text())
    assert 0 < flipped.sum() < len(flipped)
    for round_ in rounds:
        here = table[table["round"] == round_["round"]]
        assert (here.flipped.to_numpy(bool) == flipped).all()
        expected = roc_auc_score(here.flipped, -here.margin)
        assert round_["auroc"] == pytest.approx(expected, abs=1e-6)
        assert round_["precision"] == here[here.weight == 0].flipped.mean()


def test_the_precision_is_that_of_what_was_dropped():
    """Losses that rise with the margin, as IPO's do above its target."""
    margins, flipped = np.arange(5.0), np.array([True, False, False, False, True])
    kept = np.array([True, True, True, False, False])
    found = Decision(1, 3, margins**2, margins, kept, -np.inf, {}).numbers(flipped, 0.4)
    assert found["precision"] == 0.5
    assert found["auroc"] == 0.5
    assert (found["loss_kept"], found["loss_dropped"]) == (5 / 3, 12.5)


def test_accepted_pairs_are_trained_on_and_no_others(config, monkeypatch):
    trained: list[set[tuple[int, ...]]] = [set(), set(), set()]
    original = ROPO.training_step

    def step(self, batch, batch_idx):
        for role in (Role.CHOSEN, Role.REJECTED):
            of_role = (batch.roles == role)[batch.owners]
            trained[self.trainer.current_epoch].add((int(role), *batch.targets[of_role].tolist()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ROPO, "training_step", step)
    half = ["--trainer.callbacks.resampling.quantile=0.5"]
    run = fit(config, "run", *FILTER, *SAMPLES, *half, "--model=ROPO", "--data.pairs_per_step=1")
    rows, table = run.datamodule.rows("train"), pairs(run)
    (callback,) = (c for c in run.trainer.callbacks if isinstance(c, alternation.Alternation))
    for t, decision in enumerate(callback.decisions, 1):
        here = table[table["round"] == t].set_index("pair")
        most = np.quantile(here[here.weight == 1].loss, 0.5)
        dropped = here[here.weight == 0]
        assert ((dropped.outcome == "accepted") == (dropped.new_loss <= most)).all()
        assert set(dropped.outcome) == {"accepted", "refused"}
        expected = set()
        for place in here.index[here.weight == 1]:
            pair = rows.pairs[place]
            expected |= {(Role.CHOSEN, *pair["chosen"]), (Role.REJECTED, *pair["rejected"])}
        for place in dropped.index[dropped.outcome == "accepted"]:
            pair = decision.new[place]
            expected |= {(Role.CHOSEN, *pair.chosen), (Role.REJECTED, *pair.rejected)}
        assert trained[t] == expected


def test_a_decision_survives_a_checkpoint(tmp_path):
    pairs_ = {
        3: NewPair([5, 6], [7], ("sample 1", "chosen"), (0.5, -0.25), 0.125),
        1: None,
        0: NewPair([8], [9, 10, 11], ("rejected", "sample 2"), (0.1, 0.0), 0.75),
    }
    before = Decision(
        2, 6, np.array([2.0, 1, 0, 3]), np.arange(4.0), np.arange(4) == 2, 0.5, pairs_
    )
    torch.save(before.plain(), tmp_path / "state")
    after = Decision.from_plain(torch.load(tmp_path / "state", weights_only=True))
    assert after.outcomes() == before.outcomes() == ["refused", "no pair", "kept", "accepted"]
    assert list(after.new) == list(before.new)
    assert after.new_rows() == before.new_rows() == [(3, [5, 6], [7])]
    assert after.new[0] == replace(pairs_[0], chosen=[], rejected=[])
    assert after.losses.tolist() == before.losses.tolist()
    assert (after.epoch, after.step, after.most) == (2, 6, 0.5)


def test_a_later_fit_without_it_is_plain(config):
    run = fit(config, "run", *FILTER)
    plain = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    plain.fit(run.model, run.datamodule)
    assert (run.trainer.global_step, plain.global_step) == (3 + 2 + 2, 9)


def test_it_filters_for_reward_models(config, tmp_path):
    settings = yaml.safe_load(config.read_text())
    policy = settings["model"]["init_args"]["policy"]
    optimizer = settings["model"]["init_args"]["optimizer"]
    settings["model"] = {
        "class_path": "rotopo.reward.RewardModule",
        "init_args": {"backbone": policy, "optimizer": optimizer},
    }
    config.write_text(yaml.safe_dump(settings))
    run = fit(config, "reward", *FILTER)
    table = pairs(run)
    np.testing.assert_allclose(table.loss, np.logaddexp(0, -table.margin), rtol=1e-5)
    assert run.trainer.global_step == 3 + 2 + 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.callbacks.rho=1"], "rho is 1"),
        (["--trainer.callbacks.rho=0.9"], "keeps 2 of 20 pairs"),
        (["--trainer.callbacks.epochs_per_round=0"], "epochs_per_round is 0"),
        (["--trainer.callbacks.resampling={samples: 0}"], "resampling.samples is 0"),
        (["--trainer.callbacks.resampling={temperature: 0}"], "resampling.temperature is 0"),
        (["--trainer.callbacks.resampling={quantile: 2}"], "resampling.quantile is 2"),
        ([*SAMPLES, "--model=SamPO"], "SamPO does not judge a pair by its two responses"),
        (["--model=DrDPO"], "DrDPO's loss of a pair depends"),
        (["--trainer.max_epochs=1"], "set trainer.max_epochs to 2, 3, 4"),
        (["--trainer.callbacks.epochs_per_round=2"], "set trainer.max_epochs to 4, 6, 8"),
        (["--trainer.val_check_interval=3"], "val_check_interval is 3, but a round may have 2"),
        ([*LONG, "--data.token_budget=300"], "data.token_budget is 300, but with responses of"),
        ([*LONG, "--data.token_budget=300"], "of resampling.max_new_tokens (200) a new pair"),
    ],
)
def test_what_it_cannot_do(message, options, words):
    assert words in message(*FILTER, *options)


def test_a_step_that_a_later_round_cuts_is_refused(message):
    """Two micro-batches a step: .6 of five steps is three of them, .6 of three is not two."""
    options = ["--data.pairs_per_step=4", "--trainer.accumulate_grad_batches=2"]
    error = message(*FILTER, *options, "--trainer.limit_train_batches=0.6")
    assert "comes to 3 micro-batches, which is within an optimiser step" in error


def test_unpaired_rows_are_refused(config, message, tmp_path):
    lines = [
        {"prompt": f"{i}: film", "completion": f"of {i}", "label": i % 2 == 0} for i in range(40)
    ]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kto = [f"--data.source={tmp_path}/kto.jsonl", "--model=NCA"]
    assert "training rows have one response" in message(*FILTER, *kto)
    noise = ["--data.noise=SymmetricFlips", "--data.noise.rate=0.3"]
    detect = ["--trainer.callbacks+=rotopo.robust.NoiseDetection"]
    assert "training rows have one response" in message(*noise, *detect, *kto)


def test_a_checkpoint_of_other_rounds_is_refused(config, message):
    fit(config, "run", *CHECKPOINTS, *FILTER)
    last = f"--ckpt_path={last_checkpoint(config.parent / 'run')}"
    error = message(*CHECKPOINTS, *FILTER, "--trainer.callbacks.rho=0.2", last)
    assert "trainer.callbacks.Alternation.rho is 0.2 here and 0.3 in the checkpoint" in error
    assert "rho=0.3" in message(*CHECKPOINTS, last)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_ranks_decide_as_one(config, how):
    """Exact arithmetic without dropout; samples are the same whoever draws them."""
    options = [*EXACT, *FILTER, *SAMPLES, "--model=ROPO", "--model.beta=0.3"]
    command = ["fit", "--config", str(config), *options]
    roots = [config.parent / "one", config.parent / "two"]
    of = [[f"--trainer.default_root_dir={root}", f"--data.cache_dir={root}"] for root in roots]
    run([*command, *of[0]])
    on_ranks(2, *command, *strategy(how), *of[1])
    folders = [root / "version_0" / "rounds" for root in roots]
    found = [[pd.read_csv(f / "pairs.csv"), (f / "accepted.jsonl").read_text()] for f in folders]
    one, two = found
    pd.testing.assert_frame_equal(one[0], two[0], rtol=1e-7)
    texts = [[json.loads(line)["chosen"] for line in f[1].splitlines()] for f in found]
    assert texts[0] == texts[1]


DIES = {
    "scoring": (alternation, "score"),
    "sampling": (samples, "collate_prompts"),
    "scoring the samples": (resampling, "score"),
    "choosing": (resampling, "best_and_worst"),
    "caching": (alternation, "cache_rows"),
    "writing": (alternation, "write"),
}
TRAINING = [(2, False), (3, True), (3, False), (4, True), (5, False), (6, True)]
CACHED = ["--model.policy.reference=cached"]


# Rounds of one epoch and of two by turns.
WHERE = [
    pytest.param(when, 1 + n % 2, marks=() if when == "choosing" else pytest.mark.slow)
    for n, when in enumerate(("choosing", *(w for w in DIES if w != "choosing"), *TRAINING))
]


def rounds_of(epochs: int, config: Path) -> list[str]:
    """Options of three rounds, the first of which is on all rows."""
    options = [*CHECKPOINTS, *FILTER, *SAMPLES, f"--trainer.callbacks.epochs_per_round={epochs}"]
    options += [*CACHED, f"--model.policy.reference_cache={config.parent}/reference"]
    return [*options, "--model=ROPO", "--model.beta=0.3", f"--trainer.max_epochs={3 * epochs}"]


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory, tiny_tokenizer_dir):
    """The run that is not killed, done once for each number of epochs a round."""
    folder = tmp_path_factory.mktemp("whole")
    file = save_config(folder, PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir))
    return functools.cache(lambda epochs: fit(file, f"of {epochs}", *rounds_of(epochs, file)))


@pytest.mark.parametrize(("when", "epochs"), WHERE)
def test_killed_anywhere_it_ends_in_the_same(config, monkeypatch, whole_of, when, epochs):
    """Three or six steps in the first round, with a checkpoint each, and fewer after it."""
    options, whole = rounds_of(epochs, config), whole_of(epochs)
    assert '"accepted": 0' not in tables(whole)["rounds.json"]
    with monkeypatch.context() as patch:
        if when in DIES:
            place, name = DIES[when]
            original, calls = getattr(place, name), []

            def dying(*arguments, **settings):
                calls.append(1)
                if len(calls) == 2:
                    raise Killed
                return original(*arguments, **settings)

            patch.setattr(place, name, dying)
        else:
            kill, configured = Kill(*when), ROPO.configure_callbacks
            patch.setattr(ROPO, "configure_callbacks", lambda self: [*configured(self), kill])
        with pytest.raises(Killed):
            fit(config, "killed", *options)
    last = last_checkpoint(config.parent / "killed")
    resumed = fit(config, "killed", *options, f"--ckpt_path={last}")
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert tables(resumed) == tables(whole)
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


class Uneven(Callback):
    """Epochs of 3, 1, 3, 2 and 3 steps."""

    def setup(self, trainer, pl_module, stage) -> None:
        trainer.datamodule.let_choose(self)
        trainer.reload_dataloaders_every_n_epochs = 1

    def settings(self) -> str:
        return "uneven"

    def training_rows(self, trainer, rows):
        return rows.select(range((20, 7, 19, 13, 20, 20)[trainer.current_epoch]))


LONGER = [
    ("step", (2, False)),
    ("step", (4, True)),
    ("step", (7, True)),
    ("epoch", (3, True)),
    ("epoch", (4, True)),
    ("epoch", (3, False)),
    ("epoch", (9, True)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "kill"), LONGER)
def test_a_longer_epoch_behind_a_checkpoint_is_trained_whole(config, monkeypatch, kill, saved):
    options = (
        CHECKPOINTS
        if saved == "step"
        else [CHECKPOINTS[0], *CHECKPOINTS[2:], "--trainer.callbacks.every_n_epochs=1"]
    )
    options = [*options, f"--trainer.callbacks+={__name__}.Uneven", "--trainer.max_epochs=5"]
    whole = fit(config, "whole", *options)
    assert whole.trainer.global_step == 12
    with monkeypatch.context() as patch:
        configured = DPO.configure_callbacks
        patch.setattr(DPO, "configure_callbacks", lambda self: [*configured(self), Kill(*kill)])
        with pytest.raises(Killed):
            fit(config, "killed", *options)
    last = last_checkpoint(config.parent / "killed")
    resumed = fit(config, "killed", *options, *([f"--ckpt_path={last}"] if last else []))
    assert resumed.trainer.global_step == 12
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)
    log = pd.read_csv(Path(resumed.trainer.log_dir) / "metrics.csv")
    assert log["step"].max() == 11
