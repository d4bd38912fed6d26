"""Noise detection through the command line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rotopo.robust.flips import flip_detection
from rotopo.robust.scoring import score
from tests.small_run import save_config
from tests.test_training import assert_equal, fit, weights

DETECT = ["--trainer.callbacks+=rotopo.robust.NoiseDetection", "--trainer.max_epochs=3"]
NOISE = ["--data.noise=SymmetricFlips", "--data.noise.rate=0.4"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def logged(cli) -> pd.DataFrame:
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    return log[["noise/auroc", "noise/recall", "noise/precision", "noise/fitted"]].dropna()


def test_what_is_logged_is_what_the_margins_say(config):
    run = fit(config, "run", *NOISE, *DETECT)
    assert len(logged(run)) == 3
    # Straight from the policy, a row at a time.
    data, module = run.datamodule, run.model.eval()
    loader = data.batches(data.rows("train"), range(len(data.pairs.flipped())))
    margins = np.empty(len(data.pairs.flipped()))
    with torch.no_grad():
        for places, batch in zip(loader.batch_sampler.batches, loader, strict=True):
            log_probs = module.policy(batch, module.needs)
            margins[places] = 0.3 * (log_probs.chosen_log_ratio - log_probs.rejected_log_ratio)
    expected = flip_detection(margins, data.pairs.flipped())
    last = logged(run).iloc[-1]
    assert {name: last[f"noise/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_looking_changes_nothing(config):
    seen, unseen = fit(config, "seen", *NOISE, *DETECT), fit(config, "unseen", *NOISE, DETECT[1])
    assert_equal(weights(seen), weights(unseen), rtol=0, atol=0)


def test_every_other_epoch_and_the_last(config):
    run = fit(config, "run", *NOISE, *DETECT, "--trainer.callbacks.every_n_epochs=2")
    assert len(logged(run)) == 2


def test_scores_do_not_depend_on_the_batches(config):
    run = fit(config, "run", "--model.policy.dtype=float64", "--trainer.max_epochs=1")
    data = run.datamodule
    many = score(run.trainer, data.rows("train"), "")
    data.batching = replace(data.batching, eval_pairs_per_batch=3)
    few = score(run.trainer, data.rows("train"), "")
    np.testing.assert_allclose(many.losses, few.losses, rtol=1e-9)
    np.testing.assert_allclose(many.margins, few.margins, rtol=1e-7, atol=1e-9)
    assert run.model.training


def test_without_noise_there_is_nothing_to_detect(message):
    assert "set data.noise" in message(*DETECT)
    assert "every_n_epochs is 0" in message(*NOISE, *DETECT, "--trainer.callbacks.every_n_epochs=0")
