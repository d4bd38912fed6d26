"""A plan beside what a process really takes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from rotopo.plan.load import Load
from rotopo.plan.memory import planner


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_is_near_what_a_step_takes(checkpointing, tmp_path):
    # Not before: it sets what is read when torch starts.
    from tools.bench import plan as bench

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    load = Load(2, 64, 128)
    of = bench.objective("full", checkpointing)
    with planner(of, config, checkpointing=checkpointing, device="cpu") as memory:
        planned = memory(load).peak / 2**20
    arguments = ("single", config, "full", checkpointing, load, "", str(tmp_path))
    torch.multiprocessing.spawn(bench.measure, arguments)
    found = float((tmp_path / "0").read_text())
    assert planned == pytest.approx(found, rel=0.15)
