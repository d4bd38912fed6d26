"""What is measured of a run while it trains: at its points, and leaving the training alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from rotopo.compare.curves import Points
from rotopo.compare.settings import OUTCOMES
from rotopo.data.batch import collate
from rotopo.errors import InputError
from rotopo.metrics.geometry import effective_rank
from rotopo.models.modes import evaluating
from tests.small_run import save_config
from tests.test_training import assert_equal, fit, weights

MEASURING = "rotopo.compare.measuring.Measuring"


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def measuring(folder: Path, **settings) -> str:
    settings = {"folder": str(folder), "points": 3, "prompts": 4, "max_new_tokens": 5} | settings
    return "--trainer.callbacks=" + json.dumps([{"class_path": MEASURING, "init_args": settings}])


def longer(prompt: list[dict], response: str) -> float:
    return len(response)


def test_points_of_a_run_whose_training_is_left_alone(config, tmp_path, capsys):
    plain = fit(config, "plain", "--trainer.max_epochs=2")
    (text := tmp_path / "text.txt").write_text("a film of some wit and no heart " * 20)
    judge = "tests.compare.test_measuring.longer"
    measured = fit(
        config, "with", "--trainer.max_epochs=2", measuring(tmp_path, judge=judge, text=str(text))
    )
    assert_equal(weights(measured), weights(plain), rtol=0, atol=0)
    points = Points(tmp_path)
    assert points.steps == [0, 1, 3, 6]
    # Before the first step the policy is its reference, and nobody knows better than chance.
    for name in ("reverse_kl", "forward_kl", "margin", "displacement"):
        assert points.means(name)[0] == pytest.approx(0, abs=1e-6)
    assert points.means("accuracy")[0] == 0.5
    assert (points.means("reverse_kl")[1:] > 0).all()
    # At the end it is what a test says of the same pairs.
    measured.trainer.test(measured.model, measured.datamodule, verbose=False)
    found = json.loads((Path(measured.trainer.log_dir) / "test.json").read_text("utf-8"))
    assert points.means("margin")[-1] == pytest.approx(found["yardstick"]["margin"], rel=1e-4)
    assert points.means("accuracy")[-1] == pytest.approx(found["yardstick"]["accuracy"])
    chosen = found["yardstick"]["log_ratio_per_token"]["chosen"]
    assert points.means("displacement")[-1] == pytest.approx(chosen, rel=1e-4)
    last = json.loads((tmp_path / "points" / "6.json").read_text("utf-8"))
    assert [line["score"] for line in last["responses"]] == [
        len(line["text"]) for line in last["responses"]
    ]
    assert [line["prompt"] for line in last["responses"]] == list(np.repeat(range(4), 2))
    assert all(1 <= line["tokens"] <= 5 for line in last["responses"])
    assert points.outcomes == [*list(OUTCOMES)[:-1], "perplexity"]
    assert points.means("perplexity")[0] == pytest.approx(points.means("perplexity")[-1], rel=0.5)
    # As Geometry and Perplexity have them, of the same pairs and text.
    module, data = measured.model, measured.datamodule
    rows = data.rows("test")
    batch = collate([rows[i] for i in range(8)], data.pad_id, data.batching.layout, 1.0)
    with evaluating(module.language_model):
        (state,) = module.backbone.hidden_states(batch)[-1:]
    assert points.means("effective_rank")[-1] == pytest.approx(
        float(effective_rank(state)), rel=1e-4
    )
    assert 1 < points.means("effective_rank")[-1] < 32
    assert 0 < points.means("neuron_cosine")[-1] < 1


def test_an_objective_without_a_reference_has_the_same_yardstick(config, tmp_path):
    simpo = "--model=SimPO"
    fit(config, "simpo", simpo, measuring(tmp_path), "--trainer.max_steps=3")
    points = Points(tmp_path)
    assert points.means("margin")[0] == pytest.approx(0, abs=1e-6)
    assert points.means("reverse_kl")[-1] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"points": 0}, "Measuring.points is 0"),
        ({"split": "train"}, "Measuring.split is 'train'"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, said):
    from rotopo.compare.measuring import Measuring

    with pytest.raises(InputError, match=said):
        Measuring(str(tmp_path), **settings)
