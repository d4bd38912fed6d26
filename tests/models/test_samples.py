"""Responses drawn from the reference: from the right distribution, once, and safely kept."""

import json
from collections import Counter

import pytest
import torch
from peft import LoraConfig

from rotopo.data.tokens import PairEncoder
from rotopo.models import samples
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.models.samples import sample_reference
from tests.models.families import make


@pytest.fixture
def policy(tiny_tokenizer) -> Policy:
    torch.manual_seed(0)
    model = make("llama", torch.float32, vocab_size=len(tiny_tokenizer))
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    policy = Policy.build(model, PolicyConfig(adapter=adapter), needs_reference=True)
    policy.start = None  # as if the adapter had been trained to its random values
    return policy


@pytest.fixture
def sample(policy, tiny_tokenizer, tmp_path):
    encoder = PairEncoder(tiny_tokenizer)

    def call(prompts, max_new_tokens=3, seed=0):
        return sample_reference(policy, prompts, max_new_tokens, encoder, tmp_path, seed)

    return call


def test_the_first_token_follows_the_references_distribution(policy, sample):
    n, prompt = 4000, [40, 41]
    first = Counter(response[0] for response in sample([prompt] * n, max_new_tokens=1))
    with torch.no_grad(), policy.model.disable_adapter():
        p = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    likely = p.topk(20).indices.tolist()
    for token in likely:
        spread = (p[token] * (1 - p[token]) / n).sqrt()
        assert abs(first[token] / n - p[token]) < 5 * spread


def test_drawn_once_and_then_read(sample, monkeypatch):
    prompts = [[3 + i % 90, 41 + i // 90] for i in range(140)]
    drawn = sample(prompts)
    monkeypatch.setattr(Policy, "generate", None)
    assert sample(prompts) == drawn
    assert len(drawn) == 140
    assert all(1 <= len(response) <= 3 for response in drawn)
    with pytest.raises(TypeError):  # another seed is another draw
        sample(prompts, seed=1)


def test_a_draw_that_dies_loses_only_the_part_at_hand(sample, monkeypatch, tmp_path):
    prompts = [[3 + i % 90, 41 + i // 90] for i in range(140)]
    expected = sample(prompts)
    for file in tmp_path.rglob("*.json"):
        file.unlink()
    generate, calls = Policy.generate, []

    def dying(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(Policy, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        sample(prompts)
    (kept,) = tmp_path.rglob("*.json")
    assert json.loads(kept.read_text())
    assert sample(prompts) == expected
    assert len(calls) == 4


@pytest.mark.parametrize(
    "content", ["", "[[40, 41], [4", "[[40]]", "{}", "7", '[[40], "ab"]', "[[1.5], [2]]", "[1, 2]"]
)
def test_damaged_samples_are_named(sample, tmp_path, content):
    prompts = [[40], [41]]
    expected = sample(prompts)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    with pytest.raises(samples.InputError, match=f"{file} is damaged: remove it"):
        sample(prompts)
    file.unlink()
    assert sample(prompts) == expected


def test_the_random_state_is_left_alone(sample):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample([[40, 41]])
    assert torch.equal(torch.rand(3), expected)


def test_a_response_that_ends_has_its_end_of_turn(sample, policy, tiny_tokenizer, monkeypatch):
    end = PairEncoder(tiny_tokenizer).end_of_turn_id
    monkeypatch.setattr(Policy, "generate", lambda *_, **__: [[50, 51], [50, 51, 52], []])
    found = sample([[40], [41], [42]])
    assert found == [[50, 51, end], [50, 51, 52], [end]]


def test_ranks_share_the_parts(sample, monkeypatch):
    """As the second of two ranks: only its own parts are drawn, and the first's are missed."""
    from torch import distributed

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)

    def agree(missing: list) -> None:  # with the first rank, which looked before a part was there
        missing[0] = [0, 1, 2]

    monkeypatch.setattr(distributed, "broadcast_object_list", agree)
    prompts = [[3 + i % 90, 41 + i // 90] for i in range(140)]
    with pytest.raises(samples.InputError, match=r"data\.cache_dir"):
        sample(prompts)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    shared = sample(prompts)
    monkeypatch.undo()
    assert sample(prompts) == shared
