"""Perplexity against transformers' own loss, and over any windows and batches."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rotopo.errors import InputError
from rotopo.metrics.perplexity import perplexity
from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig
from tests.small_run import save_model

TEXT = "A film of some wit, and of no heart: all will see it twice, or not at all.\n" * 3


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_model(tmp_path / "model", tiny_tokenizer)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def load(folder: Path, adapter=None, dtype="float64", reference=False) -> Policy:
    return Policy.load(PolicyConfig(path=str(folder), adapter=adapter, dtype=dtype), reference)


def test_a_text_of_one_window_has_the_models_own_loss(folder, text, tiny_tokenizer):
    found = perplexity(load(folder, dtype="float32"), tiny_tokenizer, text)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    assert found["tokens"] == ids.shape[1] - 1
    assert found["nats_per_token"] == pytest.approx(loss, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert "reference_perplexity" not in found


@pytest.mark.parametrize("window", [1, 7, 16])
def test_every_token_is_predicted_once_from_its_window(folder, text, tiny_tokenizer, window):
    policy = load(folder)
    found = perplexity(policy, tiny_tokenizer, text, window=window)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    total = 0.0
    for target in range(1, len(ids)):
        start = (target - 1) // window * window
        with torch.no_grad():
            logits = policy.language_model(torch.tensor([ids[start:target]])).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[target]])
    assert found["tokens"] == len(ids) - 1
    assert found["nats_per_token"] == pytest.approx(total / (len(ids) - 1), abs=1e-10)


@pytest.mark.parametrize("windows_per_batch", [1, 3, 100])
def test_batches_do_not_count(folder, text, tiny_tokenizer, windows_per_batch):
    policy = load(folder)
    expected = perplexity(policy, tiny_tokenizer, text, 10)
    found = perplexity(policy, tiny_tokenizer, text, 10, windows_per_batch)
    assert found["nats_per_token"] == pytest.approx(expected["nats_per_token"], abs=1e-12)


def test_the_reference_of_an_adapter_and_of_a_frozen_copy(folder, text, tiny_tokenizer):
    base = perplexity(load(folder), tiny_tokenizer, text)
    adapted = load(folder, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    start = perplexity(adapted, tiny_tokenizer, text)
    assert adapted.model.training  # as before, and no dropout in between
    assert start["perplexity"] == pytest.approx(base["perplexity"], abs=1e-9)
    whole = load(folder, reference=True)
    with torch.no_grad():
        for policy in (adapted, whole):
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    for policy in (adapted, whole):
        found = perplexity(policy, tiny_tokenizer, text)
        assert found["reference_perplexity"] == pytest.approx(base["perplexity"], abs=1e-9)
        assert abs(found["perplexity"] - base["perplexity"]) > 1e-3


def test_a_bos_that_the_tokenizer_adds_stands_in_front(folder, text, make_byte_tokenizer):
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer: PreTrainedTokenizerFast = make_byte_tokenizer(
        special, None, bos="<|bos|>", adds_bos=True
    )
    found = perplexity(load(folder), tokenizer, text)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    assert found["tokens"] == ids.shape[1] - 1
    assert found["nats_per_token"] == pytest.approx(loss, abs=1e-5)


def test_what_cannot_be_computed_is_refused(folder, text, tiny_tokenizer, tmp_path):
    policy = load(folder)
    for settings, message in (
        ({"window": 0}, "window is 0"),
        ({"windows_per_batch": 0}, "windows_per_batch is 0"),
        ({"window": 513}, "512 positions only"),
        ({"file": tmp_path / "none.txt"}, "not a readable"),
    ):
        with pytest.raises(InputError, match=message):
            perplexity(policy, tiny_tokenizer, **{"file": text, **settings})
    text.write_text("a")
    with pytest.raises(InputError, match="nothing to predict"):
        perplexity(policy, tiny_tokenizer, text)
