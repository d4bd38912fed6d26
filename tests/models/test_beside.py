"""What an adapter trains beside its layers: the numbers are those of PEFT's own model."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from transformers import PhiConfig, PhiForCausalLM

from rotopo.data.batch import collate
from rotopo.errors import InputError
from rotopo.models.beside import embeddings, in_use, original
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig
from tests.models.families import make, make_scorer
from tests.models.test_policy import assert_batches_do_not_matter, some_rows, trained

# The names are Llama's; GPT-2's below.
WAYS = {
    "rows": {"trainable_token_indices": [90, 91]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [90, 91], "lm_head": [91, 92]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [90, 91]}},
    "the head": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "an MLP": {"modules_to_save": ["layers.1.mlp"], "target_modules": "all-linear"},
}
GPT2 = {"embed_tokens": "wte", "input_layernorm": "ln_1", "layers.1.mlp": "h.1.mlp", "norm": "ln_f"}


def policy_of(family: str, tied: bool, way: str) -> Policy:
    settings = {"target_modules": ["q_proj"]} | WAYS[way]
    if family == "gpt2":
        settings |= {"target_modules": ["c_attn"]}
        for name in ("modules_to_save", "trainable_token_indices"):
            given = settings.get(name)
            if isinstance(given, dict):
                settings[name] = {GPT2.get(k, k): v for k, v in given.items()}
            elif name == "modules_to_save" and given:
                settings[name] = [GPT2.get(k, k) for k in given]
    torch.manual_seed(1)
    config = PolicyConfig(path="", adapter=LoraConfig(r=2, **settings))
    return Policy.build(make(family, tie_word_embeddings=tied), config, needs_reference=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False),
        ("llama", True),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("gemma3_text", False, marks=pytest.mark.slow),
        pytest.param("gemma3_text", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:You have requested `ensure")
def test_policy_and_reference_are_those_of_pefts_own_model(family, tied, way):
    """In float64, gradients of all that trains included; before training they are one."""
    policy = policy_of(family, tied, way)
    beside = [p for n, p in trained(policy).items() if "lora" not in n]
    assert beside
    start = policy(collate(some_rows(), 0, "packed", 1.0))
    assert torch.equal(start.chosen, start.reference_chosen)
    assert torch.equal(start.rejected, start.reference_rejected)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    policy._checked.clear()  # the model's own logits once more
    assert_batches_do_not_matter(policy, family, "segments")
    moved = policy(collate(some_rows(), 0, "packed", 1.0))
    torch.testing.assert_close(moved.reference_chosen, start.chosen, rtol=0, atol=0)
    assert (moved.chosen - start.chosen).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["rows", "both", "the head"])
def test_the_model_as_loaded_is_asked_for_its_embedding(way):
    """Not PEFT's copy of all of it, which it makes anew each time that rows of it train."""
    policy = policy_of("llama", True, way)
    model = policy.language_model
    loaded = original(model.get_input_embeddings()).weight
    assert isinstance(loaded, torch.nn.Parameter)
    assert not loaded.requires_grad
    for on_or_off in (nullcontext(), policy.reference_model()):
        with on_or_off:
            assert embeddings(model) is loaded
    assert isinstance(in_use(model.get_output_embeddings()), torch.nn.Linear)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [96]}, "names token 96, and the model has 0 to 95: enlarge"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, "names token -1"),
        ({"trainable_token_indices": [90, 90]}, "a token twice"),
        ({"modules_to_save": ["score_head"]}, "names 'score_head', and the model has no such"),
        ({"modules_to_save": ["layers"]}, "LoraConfig"),
        (
            {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [90]},
            "both whole .*and in some rows",
        ),
        (
            {"modules_to_save": ["lm_head"], "trainable_token_indices": [90]},
            "both whole .*Tied embeddings are one",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word")
def test_what_peft_would_leave_out_or_stumble_over_is_refused(settings, message):
    adapter = LoraConfig(target_modules=["q_proj"], **settings)
    with pytest.raises(InputError, match=rf"policy\.adapter.*{message}"):
        Policy.build(make("llama", tie_word_embeddings=True), PolicyConfig(adapter=adapter), True)


def test_an_adapter_of_tokens_alone_is_held_to_the_same():
    def build(tokens: list[int]) -> Policy:
        adapter = TrainableTokensConfig(token_indices=tokens, target_modules=["embed_tokens"])
        return Policy.build(make("llama"), PolicyConfig(adapter=adapter), True)

    with pytest.raises(InputError, match=r"policy\.adapter\.token_indices names token 96"):
        build([96])
    policy = build([90, 91])
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(torch.randn_like(parameter))
    assert_batches_do_not_matter(policy, "llama", "segments")


def test_rows_of_a_head_whose_bias_peft_leaves_out_are_refused():
    """With it the policy would not even begin as the reference."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = PhiForCausalLM(PhiConfig(vocab_size=96, num_attention_heads=4, **sizes)).double()
    torch.nn.init.normal_(model.lm_head.bias)

    def build(**settings) -> Policy:
        adapter = LoraConfig(target_modules=["q_proj"], **settings)
        return Policy.build(model, PolicyConfig(adapter=adapter), needs_reference=True)

    with pytest.raises(InputError, match=r"trainable_token_indices: .* has a bias"):
        build(trainable_token_indices={"lm_head": [90]})


def test_a_reward_model_trains_new_tokens_too():
    adapter = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[90, 91])
    scorer = Scorer.build(make_scorer("llama"), BackboneConfig(adapter=adapter))
    names = {n for n, p in scorer.named_parameters() if p.requires_grad and "lora" not in n}
    assert {n.split(".")[-1] for n in names} == {"weight", "default"}
    assert any("trainable_tokens_delta" in n for n in names)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    rows = [replace(row, responses=[[90, *r, 0] for r in row.responses]) for row in some_rows()]
    found = scorer(collate(rows, 0, "packed", 1.0))  # which compares with the model's own, too
    model = scorer.language_model
    expected = [
        model(input_ids=torch.tensor([row.prompt + response[:-1]])).logits.squeeze()
        for row in rows
        for response in row.responses
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
    absent = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"backbone\.adapter\.modules_to_save names 'lm_head'"):
        Scorer.build(make_scorer("llama"), BackboneConfig(adapter=absent))


def test_a_half_type_loses_small_steps_of_whole_modules_and_says_so():
    from rotopo.models.loading import trained_dtype

    adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match=r"whole modules \(lm_head\).*policy\.dtype float32"):
        trained_dtype(PolicyConfig(adapter=adapter, dtype="bfloat16"))
