"""Sequence KL against exact enumeration: every response of a model of five words."""

from functools import cache
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rotopo.compare.sequence_kl import drawn_responses, response_kls
from rotopo.metrics.bootstrap import mean_interval
from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig

WORDS, END, MOST = 5, 2, 3
PROMPTS = [[3], [4, 1, 3]]
ENCODER = SimpleNamespace(pad_id=0, stop_ids=[END], end_of_turn_id=END)
# Every response: one that ends with END, or is cut after three tokens.
RESPONSES = [
    list(ids[: ids.index(END) + 1]) if END in ids else list(ids)
    for ids in product(range(WORDS), repeat=MOST)
]
RESPONSES = [list(ids) for ids in sorted({tuple(ids) for ids in RESPONSES})]


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.6,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).double().eval()


@cache
def policy() -> Policy:
    """A policy that has moved from its reference."""
    made = Policy.build(model(0), PolicyConfig(), needs_reference=True)
    moved = model(1).state_dict()
    with torch.no_grad():
        for name, weight in made.language_model.named_parameters():
            weight.lerp_(moved[name], 0.4)
    return made


@torch.no_grad()
def log_probs(net: LlamaForCausalLM, prompt: list[int]) -> np.ndarray:
    """Log-probability of each response."""
    found = []
    for ids in RESPONSES:
        logits = net(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
    return np.array(found)


@cache
def exact() -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each prompt the log-probabilities of all responses under the policy and its reference."""
    ours = policy()
    with ours.reference_model() as reference:
        theirs = [log_probs(reference, prompt) for prompt in PROMPTS]
    return list(zip((log_probs(ours.language_model, p) for p in PROMPTS), theirs, strict=True))


@cache
def scored(layout: str = "packed") -> np.ndarray:
    """Both KLs along every response to each prompt [prompts, responses, 2]."""
    prompts = [prompt for prompt in PROMPTS for _ in RESPONSES]
    kls = response_kls(policy(), prompts, RESPONSES * len(PROMPTS), 0, layout, tokens_at_once=50)
    return kls.numpy().reshape(len(PROMPTS), len(RESPONSES), 2)


def directions(number: int):
    """The exact KL of whole responses to a prompt, who draws them, and their summed KLs."""
    ours, theirs = exact()[number]
    forward, reverse = scored()[number].T
    yield (np.exp(theirs) * (theirs - ours)).sum(), np.exp(theirs), forward
    yield (np.exp(ours) * (ours - theirs)).sum(), np.exp(ours), reverse


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_its_expectation_is_the_exact_kl(number):
    for kl, probability, summed in directions(number):
        assert probability.sum() == pytest.approx(1, abs=1e-12)
        assert kl > 0.05
        assert (probability * summed).sum() == pytest.approx(kl, rel=1e-9)
        assert (summed >= 0).all()


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_in_every_layout(layout):
    assert scored(layout) == pytest.approx(scored(), abs=1e-12)


def test_over_responses_that_it_draws_itself():
    """The draws too come from the very distribution that is scored."""
    n = 1500
    responses = drawn_responses(policy(), [PROMPTS[1]] * n, MOST, ENCODER, seed=3)
    found = response_kls(policy(), [PROMPTS[1]] * n, responses, 0)[:, 1].numpy()
    _, (kl, probability, _) = directions(1)
    assert found.mean() == pytest.approx(kl, abs=3 * found.std() / n**0.5)
    places = {tuple(ids): i for i, ids in enumerate(RESPONSES)}
    counts = np.bincount([places[tuple(ids)] for ids in responses], minlength=len(RESPONSES))
    chi2 = ((counts - n * probability) ** 2 / (n * probability)).sum()
    assert chi2 < len(RESPONSES) - 1 + 4 * (2 * (len(RESPONSES) - 1)) ** 0.5


@pytest.mark.parametrize("repetitions", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_intervals_of_200_draws_cover_it(repetitions):
    generator = np.random.default_rng(0)
    for kl, probability, summed in directions(0):
        covered = 0
        for trial in range(repetitions):
            drawn = generator.choice(summed, size=200, p=probability / probability.sum())
            low, high = mean_interval(
                drawn, resamples=1000 if repetitions > 300 else 300, seed=trial
            )
            covered += low <= kl <= high
        print(f"{covered / repetitions:.4f} of {repetitions}")
        slack = 0 if repetitions == 2000 else 0.03
        assert 0.93 - slack <= covered / repetitions <= 0.97 + slack
