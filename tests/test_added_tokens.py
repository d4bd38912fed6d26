"""Tokens that a user has added, and modules that train whole: from a fit to what is exported."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from rotopo.cli import run
from rotopo.export.command import export
from rotopo.run.checkpoints import read
from tests.ranks import on_ranks
from tests.small_run import save_config
from tests.test_distributed import assert_same_run, ranks
from tests.test_training import CHECKPOINTS, assert_equal, last_checkpoint, weights

# Two tokens for a search and its result, in every response of the rows that people bring.
NEW = ["<|search|>", "<|result|>"]
ROWS = Path(__file__).parent / "cases" / "added_tokens.jsonl"

WAYS = {
    "rows": {"trainable_token_indices": [265, 266]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [265, 266], "lm_head": [265]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [265, 266]}},
    "a factor of the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms and an MLP": {"modules_to_save": ["input_layernorm", "layers.1.mlp"]},
}


# Tied where the way must heed it, untied where not; of the head and of both each.
CASES_OF = [
    ("rows", True),
    ("rows of both", False),
    ("rows of the head", True),
    ("a factor of the embedding", True),
    ("the head", False),
    ("the head", True),
    ("the embedding", True),
    ("both", False),
    ("both", True),
    ("both as one", True),
    ("norms and an MLP", False),
]
CASES = [
    pytest.param(
        way,
        tied,
        id=f"{way}, {'tied' if tied else 'untied'}",
        marks=[] if (way, tied) == ("rows", True) else pytest.mark.slow,
    )
    for way, tied in CASES_OF
]


@pytest.fixture
def tied() -> bool:
    return True


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
    (tmp_path / "pairs.jsonl").write_text(ROWS.read_text() * 4)
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


@pytest.mark.parametrize(("way", "tied"), CASES)
def test_a_run_trains_resumes_and_is_exported(config, way, tied, tmp_path):
    cli = fit(config, way, "whole")
    assert cli.trainer.callback_metrics["speed/floor_share"] > 0
    log = logged(cli)
    assert log["train/rewards/margin"].dropna().iloc[0] == 0
    state = read(last_checkpoint(tmp_path / "whole"))["state_dict"]
    assert_equal(state, weights(cli), rtol=0, atol=0)
    assert any("q_proj" not in name for name in state)

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


def test_a_module_that_is_not_there_is_refused(config, capsys):
    with pytest.raises(SystemExit) as stop:
        run(
            arguments(config, "the head", "run", "--model.policy.adapter.modules_to_save=[head_of]")
        )
    assert stop.value.code == 2
    assert "policy.adapter.modules_to_save names 'head_of'" in capsys.readouterr().err


RANKS = [
    ("rows", "ddp"),
    ("rows of both", "fsdp2"),
    ("both", "fsdp2"),
    ("both as one", "fsdp2"),
    ("norms and an MLP", "fsdp2"),
    ("the embedding", "fsdp"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "how"), RANKS)
def test_two_ranks_train_as_one_process_does(config, way, how):
    """By SGD, since Adam makes a step of any rounding of a gradient that is zero."""
    options = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.05"]
    run(arguments(config, way, "one", *options))
    on_ranks(2, *arguments(config, way, "two", *options, *ranks(how)))
    assert_same_run(config.parent / "one", config.parent / "two")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rows", "the head"])
def test_what_fsdp1_would_divide_apart_is_refused(config, way):
    with pytest.raises(RuntimeError, match=r"rotopo: .*FSDPStrategy.*fsdp2\.yaml") as failed:
        on_ranks(2, *arguments(config, way, "two", *ranks("fsdp")))
    assert "Traceback" not in str(failed.value)
