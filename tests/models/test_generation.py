"""Responses: transformers' own where nothing is drawn, and from the right distribution where it is;
and what an adapter's layers multiply by meanwhile."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from peft import HRAConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from rotopo.data.batch import Role, TokenizedRow, collate, collate_prompts
from rotopo.errors import InputError
from rotopo.models import merging
from rotopo.models.generation import _Reader, respond
from rotopo.models.merging import folded
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.models.settings import Sampling
from rotopo.rotation import RotationConfig
from tests.models.families import FAMILIES, VOCABULARY, make

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [5, 6], [14, 15], [16, 17, 18, 19]]


def batch_of(prompts, rows=None):
    return collate_prompts(prompts, 0, range(len(prompts)) if rows is None else rows)


def greedily(model, prompts, n):
    """By transformers, each prompt alone, with no end."""
    settings = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None}
    responses = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
        responses.append(found[len(prompt) :].tolist())
    return responses


def until(response, stop_ids):
    return list(itertools.takewhile(lambda token: token not in stop_ids, response))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_are_transformers_own(family):
    """Of different lengths, two of them to one prompt, some of which end early."""
    # transformers' eager attention of padded lines overflows in float64.
    model = make(family, torch.float32 if family == "gemma2" else torch.float64).eval()
    whole = greedily(model, PROMPTS, 12)
    stop_ids = [whole[0][7], whole[1][2]]
    expected = [until(response, stop_ids) for response in whole]
    assert len({len(response) for response in expected}) > 1
    assert respond(model, batch_of(PROMPTS), Sampling(12), []) == whole
    assert respond(model, batch_of(PROMPTS), Sampling(12), stop_ids) == expected


@pytest.mark.parametrize(
    ("family", "settings"),
    [("mamba", {"state_size": 8}), ("lfm2", {"layer_types": ["conv", "full_attention"]})],
)
def test_so_they_are_where_the_cache_holds_no_keys_alone(family, settings):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | settings))
    for parameter in model.eval().parameters():
        parameter.data.mul_(6 if parameter.dim() > 1 else 1)
    whole = greedily(model, PROMPTS, 8)
    expected = [until(response, [whole[0][4]]) for response in whole]
    assert respond(model, batch_of(PROMPTS), Sampling(8), [whole[0][4]]) == expected


def test_equal_prompts_are_read_once_and_what_has_ended_no_more(monkeypatch):
    model = make("llama").eval()
    whole = greedily(model, PROMPTS, 12)
    read = []
    original = _Reader.read
    monkeypatch.setattr(
        _Reader, "read", lambda self, tokens: read.append(tokens.shape) or original(self, tokens)
    )
    found = respond(model, batch_of(PROMPTS), Sampling(12), [whole[0][1]])
    assert read[0] == (4, 9)
    assert read[-1][0] == sum(len(response) == 12 for response in found) < 5


def test_a_family_without_such_keys_is_named_and_right(monkeypatch):
    model = make("llama").eval()
    expected = greedily(model, PROMPTS, 5)
    forward = model.forward

    def cacheless(input_ids, attention_mask=None, position_ids=None, use_cache=False):
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )

    monkeypatch.setattr(model, "forward", cacheless)
    with pytest.warns(UserWarning, match="llama keeps no keys .* slow"):
        assert respond(model, batch_of(PROMPTS), Sampling(5), []) == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_samples_follow_the_distribution(temperature, top_p):
    """All responses of three tokens, enumerated; the likelihoods as transformers warps them."""
    V, n, prompt, stop = 5, 3000, [3, 2], 4
    model = make("llama", torch.float64, vocab_size=V).eval()
    triples = torch.cartesian_prod(*[torch.arange(V)] * 3)
    ids = torch.cat([torch.tensor([prompt]).expand(len(triples), -1), triples], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 1:4].flatten(0, 1)
    logits = TemperatureLogitsWarper(temperature)(ids, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(ids, logits)
    likelihoods = logits.softmax(-1).gather(1, triples.view(-1, 1)).view(-1, 3)
    expected: dict[tuple[int, ...], float] = {}
    for triple, likelihood in zip(triples.tolist(), likelihoods, strict=True):
        response = tuple(until(triple, [stop]))
        expected[response] = float(likelihood[: len(response) + 1].prod())
    assert sum(expected.values()) == pytest.approx(1)
    sampling = Sampling(3, temperature, top_p, seed=1)
    found = respond(model, batch_of([prompt] * n), sampling, [stop])
    counts = dict.fromkeys(expected, 0)
    for response in found:
        counts[tuple(response)] += 1
    likely = {response: n * p for response, p in expected.items() if n * p >= 5}
    assert all(counts[response] == 0 for response, p in expected.items() if p == 0)
    rest = n - sum(likely.values()), n - sum(counts[response] for response in likely)
    squares = [(counts[r] - mean) ** 2 / mean for r, mean in likely.items()]
    squares += [(rest[1] - rest[0]) ** 2 / rest[0]] if rest[0] >= 5 else []
    # χ²'s mean and variance.
    freedom = len(squares) - 1
    assert sum(squares) < freedom + 3 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 1.5)],
)
def test_what_nothing_can_be_drawn_by_is_refused(name, value):
    with pytest.raises(InputError, match=rf"sampling\.{name} is {value}: it"):
        Sampling(**{name: value})


def test_a_sample_does_not_depend_on_the_others():
    model = make("llama").eval()
    sampling = Sampling(8, temperature=1.0, top_p=0.9, seed=3)
    together = respond(model, batch_of(PROMPTS), sampling, [7, 8, 9, 10])
    assert together[1] != together[3]  # two of one prompt
    for rows in ([4, 2], [3], [1, 0]):
        found = respond(model, batch_of([PROMPTS[i] for i in rows], rows), sampling, [7, 8, 9, 10])
        assert found == [together[i] for i in rows]
    other = Sampling(8, temperature=1.0, top_p=0.9, seed=-4)
    assert respond(model, batch_of(PROMPTS), other, [7, 8, 9, 10]) != together


def test_prompts_have_temperatures_of_their_own():
    """Each response is that of a batch of its prompt alone, at its temperature."""
    model = make("llama").eval()
    own = [0.0, 1.5, 0.7, 0.0, 1.5]
    batch = replace(batch_of(PROMPTS), temperatures=torch.tensor(own))
    found = respond(model, batch, Sampling(8, temperature=0.2, seed=3), [7, 8, 9, 10])
    for row, temperature in enumerate(own):
        alone = Sampling(8, temperature=temperature, seed=3)
        expected = respond(model, batch_of([PROMPTS[row]], [row]), alone, [7, 8, 9, 10])
        assert found[row] == expected[0]


def test_the_reference_responds_as_its_adapter_started():
    adapter = LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj", "down_proj"])
    policy = Policy.build(make("llama"), PolicyConfig(adapter=adapter), needs_reference=True)
    before = policy.generate(batch_of(PROMPTS), Sampling(12), [])
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.neg_().mul_(torch.arange(parameter.numel()).view_as(parameter) % 3)
    assert policy.generate(batch_of(PROMPTS), Sampling(12), []) != before
    assert policy.generate(batch_of(PROMPTS), Sampling(12), [], reference=True) == before


TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS = {
    "lora": LoraConfig(r=2, init_lora_weights=False, **TARGETS),
    "dora": LoraConfig(r=2, init_lora_weights=False, use_dora=True, **TARGETS),
    "lora-bias": LoraConfig(r=2, init_lora_weights=False, lora_bias=True, **TARGETS),
    "rotation": RotationConfig(init_weights=False, **TARGETS),
    "oft": OFTConfig(oft_block_size=4, init_weights=False, **TARGETS),
    "hra": HRAConfig(r=2, init_weights=False, **TARGETS),
    "ia3": IA3Config(init_ia3_weights=False, feedforward_modules=["down_proj"], **TARGETS),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_folded_layers_are_the_same_function_and_leave_no_trace(name):
    model = get_peft_model(make("qwen2"), copy.deepcopy(ADAPTERS[name])).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = {key: (value, value.clone()) for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with folded(model):
            layers = [m for m in model.modules() if "forward" in vars(m) and hasattr(m, "merge")]
            assert bool(layers) == (name != "lora-bias")
            found = model(input_ids=ids).logits
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
        with pytest.raises(KeyboardInterrupt), folded(model):
            raise KeyboardInterrupt
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert not any("forward" in vars(m) for m in model.modules() if hasattr(m, "merge"))
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0].data_ptr()
        assert torch.equal(value, before[key][1])


def test_nothing_is_folded_where_memory_is_short(monkeypatch):
    model = get_peft_model(make("qwen2"), LoraConfig())
    monkeypatch.setattr(merging, "_free", lambda device: 0)
    with folded(model):
        assert not any("forward" in vars(m) for m in model.modules() if hasattr(m, "merge"))


def small_update(kind, dtype):
    """A policy whose adapter changes its weights by about .1 % in norm; equal in all dtypes."""
    adapter = {
        "lora": LoraConfig(r=4, target_modules="all-linear"),
        "rotation": RotationConfig(target_modules="all-linear", n_householder=0),
    }[kind]
    model = make("llama", torch.float32, hidden_size=64, intermediate_size=128)
    model = model.to(torch.bfloat16).to(dtype)
    policy = Policy.build(model, PolicyConfig(adapter=adapter), needs_reference=True).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.language_model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            size = 4e-4 if "lora_B" in name else 5e-4
            parameter.data = (size * torch.randn(parameter.shape, generator=generator)).to(
                parameter.dtype
            )
    layer = policy.language_model.get_submodule("model.layers.0.mlp.up_proj")
    twin = copy.deepcopy(layer).double()
    twin.merge()
    own = layer.get_base_layer().weight.double()
    assert 5e-4 < (twin.get_base_layer().weight - own).norm() / own.norm() < 2e-3
    return policy


@torch.no_grad()
def as_generated(policy, ids, prompt):
    """Log-probs of every token after the prompts, read as generation reads them [B, N, V]."""
    with folded(policy.language_model):
        reader = _Reader(policy.language_model, torch.ones_like(ids[:, :prompt]))
        logits = [reader.read(ids[:, :prompt])]
        logits += [reader.read(ids[:, t : t + 1]) for t in range(prompt, ids.shape[1] - 1)]
    return torch.stack(logits, dim=1).log_softmax(-1).double()


def as_trained(policy, ids, prompt):
    rows = [
        TokenizedRow(row[:prompt], [row[prompt:]], [Role.CHOSEN], i)
        for i, row in enumerate(ids.tolist())
    ]
    batch = collate(rows, 0, "padded", 1.0)
    logits = policy.logits(batch, batch.predictors)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).double().unflatten(0, (len(ids), -1))


@pytest.mark.parametrize("kind", ["lora", "rotation"])
def test_what_generates_has_a_small_update_and_no_more_rounding_than_what_trains(kind):
    """Where a weight merged in bfloat16 keeps some of the update only."""
    ids = torch.randint(3, VOCABULARY, (24, 22), generator=torch.Generator().manual_seed(0))
    exact = small_update(kind, torch.float64)
    truth = as_trained(exact, ids, 6)
    with exact.model.disable_adapter():
        update = truth - as_trained(exact, ids, 6)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        policy = small_update(kind, dtype)
        found, trained = as_generated(policy, ids, 6), as_trained(policy, ids, 6)
        assert (found - truth).norm() < 1.1 * (trained - truth).norm()
        with policy.model.disable_adapter():
            moved = found - as_generated(policy, ids, 6)
        slope = (moved * update).sum() / update.square().sum()
        assert slope == pytest.approx(1, abs=tolerance)
