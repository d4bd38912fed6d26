from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rotopo.export.command import export
from tests.export.runs import QUICK, Run, fit, tie_embeddings
from tests.reward.test_runs import save_reward_config
from tests.small_run import save_config


@pytest.fixture(scope="package")
def tokenizer(tiny_tokenizer_dir):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture(scope="package")
def lora(tmp_path_factory, tokenizer) -> Run:
    return fit(save_config(tmp_path_factory.mktemp("lora"), tokenizer))


@pytest.fixture(scope="package")
def rewards(tmp_path_factory, tokenizer) -> Run:
    folder = tmp_path_factory.mktemp("rewards")
    return fit(save_reward_config(folder, tokenizer), *QUICK, "--model.length_alpha=2")


@pytest.fixture(scope="package")
def whole(tmp_path_factory, tokenizer) -> Run:
    """Full fine-tuning of a model with tied embeddings, under a system message."""
    config = save_config(tmp_path_factory.mktemp("whole"), tokenizer)
    tie_embeddings(config.parent / "model")
    return fit(
        config, *QUICK, "--model.policy={adapter: null}", "--data.system_message=Be 'brief' {{ now"
    )


@pytest.fixture(scope="package")
def exports(lora, whole, rewards, tmp_path_factory) -> dict[str, tuple[Run, Path]]:
    """The runs, each with its export as a plain model."""
    found = {}
    for name, one in (("lora", lora), ("whole", whole), ("rewards", rewards)):
        output = tmp_path_factory.mktemp("exports") / name
        export(one.folder, output)
        found[name] = one, output
    return found


@pytest.fixture(scope="package")
def merged(exports) -> Path:
    return exports["lora"][1]
