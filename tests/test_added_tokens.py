"""Tokens that a user has added, and modules that train whole: from a fit to what is exported."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from rotopo.checkpoints import read
from rotopo.cli import run
from rotopo.export import export
from tests.ranks import on_ranks
from tests.small_run import save_config
from tests.test_distributed import assert_same_run, ranks
from tests.test_training import CHECKPOINTS, assert_equal, last_checkpoint, weights

# Restated from what people bring: two tokens for a search and its result, in every response.
NEW = ["<|search|>", "<|result|>"]
PLACES = ["Oslo", "Lima", "Rome", "Cairo", "Quito", "Delhi", "Tunis", "Paris"]


def row(place: str) -> dict[str, str]:
    search, result = NEW
    return {
        "prompt": f"Where is {place}?",
        "chosen": f"{search}{place}{result}{place} is far.",
        "rejected": f"{search}town{result}I do not know {place}.",
    }


WAYS = {
    "rows": {"trainable_token_indices": [265, 266]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [265, 266], "lm_head": [265]}},
    "the head": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms and an MLP": {"modules_to_save": ["input_layernorm", "layers.1.mlp"]},
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tied: bool) -> Path:
    """A run on a model whose tokenizer has two more tokens, and whose embedding was enlarged."""
    file = save_config(tmp_path, tiny_tokenizer)
    settings = LlamaForCausalLM.from_pretrained(tmp_path / "model").config
    settings.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings)
    assert tiny_tokenizer.add_tokens(NEW) == 2
    model.resize_token_embeddings(len(tiny_tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [row(place) for place in PLACES] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def arguments(config: Path, way: str, root: str, *options: str) -> list[str]:
    """Options of a run whose adapter trains more than its layers."""
    file = config.parent / f"{way}.yaml"
    adapter = {"model": {"init_args": {"policy": {"adapter": {"init_args": WAYS[way]}}}}}
    file.write_text(yaml.safe_dump(adapter))
    folder = config.parent / root
    return [
        *("fit", f"--config={config}", f"--config={file}", *CHECKPOINTS, *options),
        f"--trainer.default_root_dir={folder}",
        f"--data.cache_dir={folder / 'cache'}",
        "--model.policy.adapter.lora_dropout=0",
        "--data.pairs_per_step=4",
    ]


def fit(config: Path, way: str, root: str, *options: str):
    return run(arguments(config, way, root, *options))


def logged(cli) -> pd.DataFrame:
    return pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")


@pytest.mark.parametrize("way", WAYS)
def test_a_run_trains_resumes_and_is_exported(config, way, tied, tmp_path):
    cli = fit(config, way, "whole")
    assert cli.trainer.callback_metrics["speed/floor_share"] > 0
    log = logged(cli)
    assert log["train/rewards/margin"].dropna().iloc[0] == 0
    state = read(last_checkpoint(tmp_path / "whole"))["state_dict"]
    assert_equal(state, weights(cli), rtol=0, atol=0)
    assert any("lora" not in name for name in state)

    (middle,) = (tmp_path / "whole").rglob("*step=3.ckpt")
    resumed = fit(config, way, "resumed", f"--ckpt_path={middle}")
    assert_equal(weights(resumed), weights(cli), rtol=0, atol=0)
    cached = fit(config, way, "cached", "--model.policy.reference=cached")
    assert_equal(weights(cached), weights(cli), rtol=1e-5, atol=1e-6)

    ids = torch.arange(3, 267)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    cli.model.eval()
    with torch.no_grad():
        expected = cli.model.policy.model(input_ids=ids).logits
        with cli.model.policy.reference_model() as reference:
            before = reference(input_ids=ids).logits
        torch.testing.assert_close(before, base(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        assert (expected - before).abs().max() > 1e-3
        for form in ("merged", "adapter"):
            export(tmp_path / "whole" / "version_0", tmp_path / form, form=form)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
