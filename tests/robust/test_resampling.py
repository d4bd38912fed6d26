"""New pairs against responses scored one by one by the Hugging Face model."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from rotopo.models import samples
from rotopo.robust.resampling import Resampling, resample
from tests.small_run import save_config
from tests.test_training import fit

BETA, ALPHA = 0.3, 14.0
DROPPED = [0, 3, 4, 9, 17]


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer):
    config = save_config(tmp_path, tiny_tokenizer)
    ropo = ["--model=ROPO", f"--model.beta={BETA}", "--model.policy.dtype=float64"]
    return fit(config, "run", *ropo, "--trainer.max_epochs=1", "--data.max_length=80")


@pytest.fixture
def drawn(monkeypatch) -> list[list[int]]:
    """The samples of the next resampling."""
    found: list[list[int]] = []
    draw = samples.draw

    def recording(*arguments, **settings):
        responses, folder = draw(*arguments, **settings)
        found.extend(responses)
        return responses, folder

    monkeypatch.setattr(samples, "draw", recording)
    return found


@torch.no_grad()
def reward(run, prompt: list[int], response: list[int]) -> float:
    """β log(π_θ/π_ref) from plain logits."""
    model, totals = run.model.policy.model.eval(), []
    for context in (nullcontext(), model.disable_adapter()):
        with context:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        totals.append(log_p.gather(1, torch.tensor(response)[:, None]).sum().item())
    return BETA * (totals[0] - totals[1])


def loss(z: float) -> float:
    scale = 4 * ALPHA / (1 + ALPHA) ** 2
    return scale * math.log1p(math.exp(-z)) + scale * ALPHA / (1 + math.exp(z))


@pytest.mark.parametrize("against_chosen", [False, True])
def test_new_pairs_are_the_best_and_the_worst(run, drawn, against_chosen):
    rows = run.datamodule.rows("train")
    settings = Resampling(samples=3, max_new_tokens=5, against_chosen=against_chosen)
    made = resample(run.trainer, rows, DROPPED, settings)
    assert len(drawn) == 3 * len(DROPPED)
    for number, (place, pair) in enumerate(zip(DROPPED, made, strict=True)):
        row = rows.pairs[place]
        pool = {"chosen": row["chosen"], "rejected": row["rejected"]}
        room = 80 - len(row["prompt"])
        for k in range(3):
            pool[f"sample {k + 1}"] = drawn[3 * number + k][:room]
        rewards = {name: reward(run, row["prompt"], ids) for name, ids in pool.items()}
        if against_chosen:
            far = max(rewards, key=lambda name: abs(rewards[name] - rewards["chosen"]))
            ordered = sorted(("chosen", far), key=lambda name: -rewards[name])
        else:
            ordered = [
                max(rewards, key=lambda n: rewards[n]),
                min(rewards, key=lambda n: rewards[n]),
            ]
        assert pair.origin == tuple(ordered)
        assert [pair.chosen, pair.rejected] == [pool[name] for name in ordered]
        assert pair.rewards == pytest.approx([rewards[name] for name in ordered], rel=1e-6)
        assert pair.loss == pytest.approx(loss(pair.rewards[0] - pair.rewards[1]), rel=1e-6)


def test_nothing_is_left_in_the_cache_and_the_random_state_stays(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    settings = Resampling(samples=2, max_new_tokens=5)
    rows = run.datamodule.rows("train")
    first = resample(run.trainer, rows, DROPPED, settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list((run.datamodule.pairs.cache_dir / "samples").iterdir())
    assert resample(run.trainer, rows, DROPPED, settings) == first
    other = Resampling(samples=2, max_new_tokens=5, seed=1)
    assert resample(run.trainer, rows, DROPPED, other) != first


def test_where_all_rewards_are_equal_there_is_no_pair(run):
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # the policy is its reference
    settings = Resampling(samples=2, max_new_tokens=5)
    made = resample(run.trainer, run.datamodule.rows("train"), DROPPED, settings)
    assert made == [None] * len(DROPPED)
