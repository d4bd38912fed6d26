"""The router loss: transformers' own on the padded layout, and the same in all others."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.loading import load_config
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.models.router import RouterLoss, sharers
from rotopo.models.scorer import Scorer
from rotopo.models.settings import BackboneConfig
from rotopo.objectives import DPO, SFT, Mixture
from rotopo.reward import RewardModule
from tests.models.families import FAMILIES, MIXTURES, make, make_scorer
from tests.models.test_policy import lora, some_rows, trained

C, R = Role.CHOSEN, Role.REJECTED
LAYOUTS = ("padded", "shared_prompt", "packed")
# One, two and three responses to a prompt, which counts as often.
ROWS = [
    TokenizedRow([9, 8, 7, 6], [[5, 4, 3]], [C], 0),
    *some_rows(3),
    TokenizedRow([20, 21], [[22, 23, 2], [24], [25, 26, 27, 2]], [C, R, Role.MISMATCHED], 4),
]
# transformers adds probabilities up in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def policy_of(family: str, adapter="lora", attention="segments", **settings) -> Policy:
    torch.manual_seed(1)
    model = make(family, attn_implementation=attention)
    config = PolicyConfig(adapter=lora("") if adapter else None, **settings)
    return Policy.build(model, config, needs_reference=True)


def own_loss(model, batch) -> torch.Tensor:
    """transformers' of a causal language model on a padded batch."""
    mask = (batch.segment_ids >= 0).long()
    return model(batch.input_ids, attention_mask=mask, output_router_logits=True).aux_loss


def gradients(loss: torch.Tensor, backbone) -> list[torch.Tensor]:
    parameters = trained(backbone).values()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [p.new_zeros(()) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, backbone) -> None:
    pairs = list(zip(gradients(found, backbone), gradients(expected, backbone), strict=True))
    largest = max(b.abs().max() for _, b in pairs)
    assert largest > 1e-4
    for a, b in pairs:
        assert (a - b).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize(
    ("family", "attention", "adapter"),
    [
        *((family, "segments", "lora") for family in MIXTURES),
        ("mixtral", "sdpa", None),
        ("mixtral", "eager", "lora"),
    ],
)
def test_it_is_the_models_own_in_every_layout(family, attention, adapter):
    policy = policy_of(family, adapter, attention)
    assert policy.router.coefficient == 0.02
    expected = own_loss(policy.model, collate(ROWS, 0, "padded", 1.0))
    assert expected > 2  # of 2 experts a token, 2 is even use
    for layout in LAYOUTS:
        policy(collate(ROWS, 0, layout, 1.0))
        torch.testing.assert_close(policy.router_loss, expected, **CLOSE)
        assert_same_gradients(policy.router_loss, expected, policy)
        expected = own_loss(policy.model, collate(ROWS, 0, "padded", 1.0))


def test_it_is_not_the_references():
    policy = policy_of("mixtral")
    policy.start = None  # as if the adapter had been trained to its random values
    batch = collate(ROWS, 0, "padded", 1.0)
    with policy.reference_model() as model:
        of_reference = own_loss(model, batch)
    policy(batch)
    assert (policy.router_loss - of_reference).abs() > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_models_is_its_decoders(family, layout):
    torch.manual_seed(1)
    config = BackboneConfig(adapter=lora(""))
    scorer = Scorer.build(make_scorer(family, attn_implementation="segments"), config)
    language_model = make(family)
    language_model.model = scorer.language_model.model
    scorer(collate(ROWS, 0, layout, 1.0))
    expected = own_loss(language_model, collate(ROWS, 0, "padded", 1.0))
    torch.testing.assert_close(scorer.router_loss, expected, **CLOSE)
    assert_same_gradients(scorer.router_loss, expected, scorer)


@pytest.mark.parametrize("adapter", ["lora", None])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_activation_checkpointing_changes_no_gradient(adapter, layout):
    batch = collate(ROWS, 0, layout, 1.0)
    kept, again = (
        policy_of("qwen2_moe", adapter, activation_checkpointing=on).train() for on in (False, True)
    )
    for policy in (kept, again):
        policy(batch)
    torch.testing.assert_close(again.router_loss, kept.router_loss, rtol=0, atol=0)
    for a, b in zip(*(gradients(p.router_loss, p) for p in (again, kept)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    torch._dynamo.reset()
    values = []
    for compiled in (False, True):
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = make("mixtral", torch.float32, attn_implementation="segments")
        config = PolicyConfig(adapter=adapter, compile=compiled)
        policy = Policy.build(model, config, needs_reference=False)
        policy(collate(ROWS, 0, "packed", 1.0), Needs(reference=False))
        values.append([policy.router_loss, *gradients(policy.router_loss, policy)])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sharers_by_hand():
    rows = [TokenizedRow([5, 6], [[7, 8], [9]], [C, R], 0), TokenizedRow([5], [[6, 7, 8]], [C], 1)]
    expected = {
        "padded": [[1, 1, 1], [1, 1, 0], [1, 1, 1]],
        "shared_prompt": [[2, 2, 1], [1, 1, 1]],
        "packed": [[2, 2, 1, 1, 1, 1]],
    }
    for layout, counts in expected.items():
        assert sharers(collate(rows, 0, layout, 1.0)).tolist() == counts


def of(model, **settings) -> RouterLoss | None:
    return RouterLoss.of(model, BackboneConfig(**settings))


def test_the_coefficient_is_the_setting_or_the_models_own():
    model = make("mixtral")
    assert of(model).coefficient == 0.02
    assert of(model, router_loss=3).coefficient == 3
    assert of(model, router_loss=0) is None
    assert of(make("mixtral", router_aux_loss_coef=0.0)) is None
    assert of(make("mixtral", router_aux_loss_coef=0.0), router_loss=0.1).coefficient == 0.1
    # Nothing to balance, and nothing is asked for.
    assert of(make("llama")) is of(make("llama"), router_loss=0) is of(make("deepseek_v3")) is None


def test_a_dense_model_of_a_family_with_experts_has_none():
    settings = {**FAMILIES["llama"], "num_local_experts": 0, "shared_intermediate_size": 48}
    layers = {"layer_types": ["full_attention"] * 2, "mamba_n_heads": 4}
    config = AutoConfig.for_model("granitemoehybrid", **settings, **layers)
    model = AutoModelForCausalLM.from_config(config)
    assert config.router_aux_loss_coef > 0
    assert of(model) is None
    with pytest.raises(InputError, match="granitemoehybrid is no mixture of experts"):
        of(model, router_loss=0.1)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_is_refused(value):
    with pytest.raises(InputError, match=r"backbone\.router_loss is .* at least 0"):
        of(make("mixtral"), router_loss=value)


def test_what_cannot_be_computed_is_refused_and_trains_without():
    with pytest.raises(InputError, match=r"router_loss is 0\.1.*llama is no mixture.*leave it out"):
        of(make("llama"), router_loss=0.1)
    with pytest.raises(InputError, match=r"no router loss for deepseek_v3.*set it to 0"):
        of(make("deepseek_v3"), router_loss=0.1)
    # transformers has the coefficient and no loss.
    tiny = {**FAMILIES["llama"], "intermediate_size_mlp": 16, "num_local_experts": 2, "head_dim": 8}
    llama4 = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **tiny))
    with pytest.raises(InputError, match=r"router_loss: .*no router loss for llama4_text"):
        of(llama4)
    # Another function, whose routers choose by two keys.
    doge = {**FAMILIES["llama"], "is_moe": True, "num_experts": 4, "num_experts_per_tok": 2}
    doge = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **doge))
    with pytest.raises(InputError, match=r"no router loss for doge.*set it to 0"):
        of(doge)
    for model in (llama4, doge):
        assert of(model, router_loss=0) is None
    # The coefficient under another name.
    jetmoe = {**FAMILIES["llama"], "num_local_experts": 2, "num_experts_per_tok": 1}
    jetmoe |= {"kv_channels": 8, "num_key_value_heads": 4}
    jetmoe = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **jetmoe))
    with pytest.raises(InputError, match=r"jetmoe has a router loss.*no router_aux_loss_coef"):
        of(jetmoe)
    assert of(jetmoe, router_loss=0.1).coefficient == 0.1


def test_an_auxiliary_loss_that_transformers_lacks_is_named():
    with pytest.warns(UserWarning, match=r"deepseek_v3.*aux_loss_alpha 0\.001.*left out"):
        assert of(make("deepseek_v3", aux_loss_alpha=0.001)) is None


def test_a_routers_noise_is_switched_off_like_dropout(tmp_path):
    make("mixtral", torch.float32, router_jitter_noise=0.3).save_pretrained(tmp_path)
    config = PolicyConfig(str(tmp_path), lora(""), "float32")
    policy = Policy.load(config, needs_reference=True).train()
    batch = collate(some_rows(), 0, "packed", 1.0)
    assert torch.equal(policy(batch).chosen, policy(batch).chosen)


def test_a_family_that_draws_its_experts_is_named(tmp_path):
    settings = {**FAMILIES["mixtral"], "input_jitter_noise": 0.1}
    AutoConfig.for_model("phimoe", **settings).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="phimoe chooses at random"):
        config = load_config(str(tmp_path))
    assert (config.router_jitter_noise, config.input_jitter_noise) == (0.01, 0)


def test_routers_that_tell_nothing_are_refused():
    policy = policy_of("mixtral")
    decoder = policy.language_model.base_model
    forward = decoder.forward
    decoder.forward = lambda output_router_logits=False, **inputs: forward(**inputs)
    with pytest.raises(InputError, match=r"policy\.router_loss: .*no router logits: set it to 0"):
        policy(collate(ROWS, 0, "padded", 1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["DPO", "Mixture", "reward"])
def test_a_steps_loss_has_it_once_and_unscaled(kind, layout):
    batch = collate(some_rows(), 0, layout, loss_scale=0.2)
    steps = {}
    for coefficient in (0.0, 1000.0):
        torch.manual_seed(1)
        settings = {"adapter": lora(""), "router_loss": coefficient}
        if kind == "reward":
            module = RewardModule()
            model = make_scorer("mixtral", attn_implementation="segments")
            module.scorer = Scorer.build(model, BackboneConfig(**settings))
        else:
            module = DPO() if kind == "DPO" else Mixture([DPO(), SFT()], [1.0, 0.5])
            model = make("mixtral", attn_implementation="segments")
            module.policy = Policy.build(model, PolicyConfig(**settings), needs_reference=True)
        steps[coefficient] = module.training_step(batch, 0)
    without, given = steps.values()
    assert "router_loss" not in without
    assert not given["router_loss"].requires_grad
    torch.testing.assert_close(
        given["pairs"].losses, without["pairs"].losses, rtol=1e-10, atol=1e-10
    )
    added = given["loss"] - without["loss"]
    torch.testing.assert_close(added, 1000 * given["router_loss"].double(), rtol=1e-6, atol=1e-6)
