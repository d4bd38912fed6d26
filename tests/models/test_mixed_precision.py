"""Float32 masters computed with in bfloat16, against transformers' own models in bfloat16."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rotopo.data.batch import collate, collate_prompts
from rotopo.errors import InputError
from rotopo.models.loading import trained_dtype
from rotopo.models.mixed_precision import kept_wide
from rotopo.models.policy import Policy
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig, PolicyConfig, Sampling
from rotopo.models.sharding import Sharding
from tests.models.families import FAMILIES, VOCABULARY, make, make_scorer
from tests.models.test_policy import dpo_loss, some_rows
from tests.models.test_scorer import some_rows as rows_to_score

# Whose routers stay in float32 in a model that is loaded in bfloat16.
WIDE_ROUTERS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def wide(family: str) -> PreTrainedModel:
    if family == "ernie4_5_moe":
        config = AutoConfig.for_model(family, **WIDE_ROUTERS, router_aux_loss_coef=0.0)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    name = family.removesuffix(", tied")
    return make(name, torch.float32, **{"tie_word_embeddings": True} if name != family else {})


def pair(family: str, folder, **settings) -> tuple[Policy, Policy]:
    """A policy of float32 masters, and one of the same model as transformers loads it in half."""
    model = wide(family)
    attention = "eager" if family == "gemma2" else "segments"
    model.set_attn_implementation(attention)
    model.save_pretrained(folder)
    half = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention
    )
    one = Policy.build(model, PolicyConfig(compute_dtype="bfloat16", **settings), True)
    return one, Policy.build(half, PolicyConfig(**settings), True)


QUICK = ("llama, tied", "gemma2", "mixtral", "ernie4_5_moe")


@pytest.mark.parametrize(
    "family",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK),
    ],
)
def test_it_is_the_model_in_bfloat16_bit_for_bit(family, tmp_path):
    """Logits, log-probs and gradients; and step 0 is exactly 0, since the reference is that too."""
    policy, half = pair(family, tmp_path)
    layout = "padded" if family == "gpt2" else "shared_prompt"
    batch = collate(some_rows(), 0, layout, 1.0)
    found, expected = policy(batch), half(batch)
    for name in ("chosen", "rejected", "reference_chosen", "reference_rejected"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.chosen, found.reference_chosen)
    assert torch.equal(found.rejected, found.reference_rejected)
    for log_probs in (found, expected):
        dpo_loss(log_probs).backward()
    gradients = {n: p.grad for n, p in half.named_parameters() if p.requires_grad}
    masters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert (
        masters.keys() <= gradients.keys()
    )  # loaded, a bias of ernie's trains that has no gradient
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master.grad, gradients[name].float()), name
    held = dict(half.reference.named_parameters())
    for name, parameter in policy.reference.named_parameters():
        assert parameter.dtype == held[name].dtype
        assert torch.equal(parameter, held[name])
    assert bool(kept_wide(policy.language_model)) == (family in ("ernie4_5_moe", "deepseek_v3"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama, tied", "ernie4_5_moe"])
def test_fsdp2_computes_the_same(family, tmp_path):
    policy, _ = pair(family, tmp_path)
    half = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="segments"
    )
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharding = Sharding(init_device_mesh("cpu", (1,)))
        config = PolicyConfig(compute_dtype="bfloat16")
        divided = Policy.build(half, config, True, torch.float32, sharding)
        batch = collate(some_rows(), 0, "packed", 1.0)
        for one in (policy, divided):
            dpo_loss(one(batch)).backward()
        for (name, one), other in zip(
            policy.model.named_parameters(), divided.model.parameters(), strict=True
        ):
            if one.grad is not None:
                assert torch.equal(one.grad, other.grad.full_tensor()), name
        for one, other in zip(
            policy.reference.parameters(), divided.reference.parameters(), strict=True
        ):
            assert torch.equal(one, other.full_tensor())
    finally:
        dist.destroy_process_group()


def test_logits_are_those_of_the_plain_model(tmp_path):
    policy, half = pair("llama", tmp_path)
    plain = half.language_model
    batch = collate(some_rows(), 0, "padded", 1.0)
    with torch.no_grad():
        states = plain.base_model(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)
        expected = plain.lm_head(states[batch.predictors]).float()
    assert torch.equal(policy.logits(batch, batch.predictors), expected)
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_what_it_says_and_shows_elsewhere_is_the_half_models_too(tmp_path):
    policy, half = pair("llama", tmp_path)
    prompts = collate_prompts([[5, 6, 7], [8, 9]], 0, [0, 1])
    sampling = Sampling(max_new_tokens=6)
    for reference in (False, True):
        found = policy.generate(prompts, sampling, [2], reference)
        assert found == half.generate(prompts, sampling, [2], reference)
    batch = collate(some_rows(), 0, "packed", 1.0)
    for found, expected in zip(policy.hidden_states(batch), half.hidden_states(batch), strict=True):
        assert torch.equal(found, expected)
    assert policy.compute_dtype == torch.bfloat16
    assert policy.reference_fingerprint == half.reference_fingerprint
    whole = Policy.build(wide("llama"), PolicyConfig(), True)
    assert policy.reference_fingerprint != whole.reference_fingerprint


def test_a_cached_reference_is_computed_in_it_too(tmp_path):
    policy, _ = pair("llama", tmp_path / "model")
    batch = collate(some_rows(), 0, "packed", 1.0)
    policy.open_cache(str(tmp_path / "cache"))
    policy.cache_reference([batch])
    cached = policy(batch)
    assert torch.equal(cached.chosen, cached.reference_chosen)
    assert torch.equal(cached.rejected, cached.reference_rejected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_layers_make_their_copies_again_and_keep_none(checkpointing, tmp_path):
    policy, half = pair("llama", tmp_path, activation_checkpointing=checkpointing)
    kept: list[torch.Tensor] = []
    batch = collate(some_rows(), 0, "packed", 1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = dpo_loss(policy(batch))
    weight = policy.language_model.base_model.layers[1].mlp.up_proj.weight
    copies = [
        t for t in kept if t.dtype == torch.bfloat16 and t.shape in (weight.shape, weight.T.shape)
    ]
    assert bool(copies) != checkpointing
    loss.backward()
    dpo_loss(half(batch)).backward()
    for (name, one), other in zip(
        policy.model.named_parameters(), half.model.parameters(), strict=True
    ):
        assert torch.equal(one.grad, other.grad.float()), name


def test_masters_keep_the_small_steps_that_a_half_weight_loses(tmp_path):
    policy, half = pair("llama", tmp_path)
    batch = collate(some_rows(), 0, "packed", 1.0)
    moved = []
    for one in (policy, half):
        weight = one.language_model.base_model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-6, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            dpo_loss(one(batch)).backward()
            optimizer.step()
        moved.append(float((weight != before).float().mean()))
    assert moved[0] > 0.99
    assert moved[1] < 0.05


def test_gradients_of_micro_batches_add_up_in_float32(tmp_path):
    policy, _ = pair("llama", tmp_path)
    rows = some_rows()
    batches = [collate(rows[:2], 0, "packed", 1.0), collate(rows[2:], 0, "packed", 1.0)]
    parameters = list(policy.model.parameters())
    each = [torch.autograd.grad(dpo_loss(policy(batch)), parameters) for batch in batches]
    for batch in batches:
        dpo_loss(policy(batch)).backward()
    for parameter, first, second in zip(parameters, *each, strict=True):
        assert torch.equal(first, first.bfloat16().float())  # computed in bfloat16
        assert torch.equal(parameter.grad, first + second)


def test_a_failing_pass_leaves_the_masters_in_their_places(tmp_path):
    policy, _ = pair("llama", tmp_path)
    before = dict(policy.named_parameters())
    layer = policy.language_model.base_model.layers[1]
    layer.mlp.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        policy(collate(some_rows(), 0, "packed", 1.0))
    after = dict(policy.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_a_reward_models_head_stays_in_float32(tmp_path):
    model = make_scorer("llama", torch.float32)
    model.save_pretrained(tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.score = copy.deepcopy(model.score)
    batch = collate(rows_to_score(), 0, "padded", 1.0)
    scorer = Scorer.build(model, BackboneConfig(compute_dtype="bfloat16"))
    plain = Scorer.build(half, BackboneConfig())
    found, expected = scorer(batch), plain(batch)
    assert torch.equal(found, expected)
    for rewards in (found, expected):
        rewards.square().sum().backward()
    for (name, one), other in zip(
        scorer.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        assert torch.equal(one.grad, other.grad.float()), name


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"adapter": LoraConfig(target_modules=["q_proj"])}, r"policy\.adapter is set"),
        ({"dtype": "bfloat16"}, r"policy\.dtype is\s+bfloat16: set it to float32"),
        ({"dtype": "float64"}, r"policy\.dtype is\s+float64"),
        ({"compute_dtype": "float16"}, "has to be bfloat16"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded(settings, named):
    config = PolicyConfig(path="nothing is here", **({"compute_dtype": "bfloat16"} | settings))
    with pytest.raises(InputError, match=named):
        Policy.load(config, True)


def test_training_in_a_half_type_is_told_of_it():
    with pytest.warns(UserWarning, match=r"policy\.compute_dtype bfloat16"):
        trained_dtype(PolicyConfig(dtype="bfloat16"))
