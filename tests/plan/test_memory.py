"""Plans against closed forms, and against the whole trace of a small model."""

from functools import partial

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models import loading
from rotopo.models.settings import PolicyConfig
from rotopo.objectives import DPO, KTO, TYPO, SimPO
from rotopo.plan import memory as plan_memory
from rotopo.plan.load import Load
from rotopo.plan.memory import BUCKETS, Strategy, planner
from rotopo.plan.search import most_pairs
from rotopo.plan.step import GRADIENTS, MOMENTS, TRAINED
from rotopo.rotation import RotationConfig

LORA = LoraConfig(r=4, target_modules=["q_proj"])
V, D, F = 256, 64, 96


def config(layers=1):
    return LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def module(adapter=None, objective=DPO, optimizer=torch.optim.AdamW, **settings):
    dtype = settings.pop("dtype", "float32")
    policy = PolicyConfig(path="none", adapter=adapter, dtype=dtype, **settings)
    return objective(policy=policy, optimizer=partial(optimizer, lr=1e-3))


def memory(of, load=Load(2, 5, 40), strategy=Strategy(), layers=1, **settings):  # noqa: B008
    with planner(of, config(layers), strategy, **settings) as found:
        return found(load)


def weights(layers):
    """Of a Llama: embeddings and head, norms, q and o, k and v of half as many heads, the MLP."""
    return 2 * V * D + D + layers * (2 * D + 2 * D * D + 2 * D * (D // 2) + 3 * D * F)


def test_weights_gradients_and_moments_of_full_fine_tuning():
    held = memory(module()).held
    whole = 4 * weights(1)
    assert held[TRAINED] == held["the reference's weights"] == held[GRADIENTS] == whole
    tensors = 3 + 9  # each with a count of its steps
    assert held[MOMENTS] == 2 * whole + 4 * tensors


def test_an_adapter_trains_alone_and_is_its_own_reference():
    held = memory(module(LORA, dtype="bfloat16")).held
    assert held["frozen weights"] == 2 * weights(1)
    assert held[TRAINED] == held[GRADIENTS] == 4 * (4 * D + D * 4)  # float32
    assert "the reference's weights" not in held


def test_computed_in_a_half_type_the_reference_is_held_in_it():
    held = memory(module(compute_dtype="bfloat16")).held
    assert held[TRAINED] == 4 * weights(1) == 2 * held["the reference's weights"]


def test_what_checkpointing_keeps_of_a_layer_is_its_input():
    load = Load(3, 5, 40)
    tokens = load.tokens(Needs())
    assert tokens == 3 * (5 + 2 * 39)
    kept = []
    for layers in (1, 2):
        found = memory(module(LORA), load, layers=layers, checkpointing=True, accumulated=True)
        kept.append(found.peak - sum(found.held.values()))
    assert kept[1] - kept[0] == tokens * D * 4


def test_of_one_input_adapters_keep_no_wide_copy(monkeypatch):
    """Without that the second layer would keep three in float32, and none as it came."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    of, load = module(lora, dtype="bfloat16"), Load(3, 5, 40)
    ours = memory(of, load, layers=2).peak
    monkeypatch.setattr(loading, "keep_inputs_as_they_come", lambda model: None)
    assert memory(of, load, layers=2).peak - ours == load.tokens(Needs()) * D * (3 * 4 - 2)


def multiplied_and_traced(adapter, strategy, monkeypatch, **settings):
    found = []
    for few in (plan_memory._FEW, {strategy.kind: 100}, plan_memory._FEW):
        with monkeypatch.context() as patch:
            patch.setattr(plan_memory, "_FEW", few)
            found.append(memory(module(adapter), Load(2, 30, 60), strategy, 6, **settings))
    return found[1:]  # the first fills what is made once in a process


def test_layers_multiplied_are_layers_traced(monkeypatch):
    traced, multiplied = multiplied_and_traced(LORA, Strategy(), monkeypatch, checkpointing=True)
    assert traced == multiplied


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy(), Strategy("fsdp2", 2)])
@pytest.mark.parametrize("often", [False, True])
@pytest.mark.parametrize("adapter", [None, RotationConfig()])
def test_layers_multiplied_are_layers_traced_everywhere(adapter, often, strategy, monkeypatch):
    settings = {"accumulated": often, "checkpointing": often}
    traced, multiplied = multiplied_and_traced(adapter, strategy, monkeypatch, **settings)
    assert traced == multiplied


def test_more_tokens_take_more():
    of = module(RotationConfig())
    with planner(of, config()) as found:
        loads = [Load(n, 10, response) for n, response in ((1, 20), (2, 20), (2, 40), (3, 40))]
        peaks = [found(load).peak for load in loads]
    assert peaks == sorted(set(peaks))


def test_shares_of_the_ranks_are_the_whole():
    whole = memory(module(), strategy=Strategy("fsdp2", 1)).held
    for ranks in (2, 4):  # which divide every first dimension here
        share = memory(module(), strategy=Strategy("fsdp2", ranks)).held
        for part in (TRAINED, "the reference's weights", GRADIENTS):
            assert ranks * share[part] == whole[part] == 4 * weights(1)


def test_buckets_of_ddp_are_what_trains_and_may_hold_the_gradients():
    own, views = (memory(module(), strategy=Strategy("ddp", 2, v)).held for v in (False, True))
    assert own[BUCKETS] == own[GRADIENTS] == views[BUCKETS] == own[TRAINED]
    assert GRADIENTS not in views


def test_an_accumulated_gradient_is_there_in_every_pass():
    once, again = (memory(module(), accumulated=a) for a in (False, True))
    assert again.peak >= once.peak
    assert again.most[GRADIENTS] == 4 * weights(1)


def test_without_a_reference_or_with_a_cached_one_no_copy_is_needed():
    assert "the reference's weights" not in memory(module(objective=SimPO)).held
    online, cached = (memory(module(LORA), cached=c).peak for c in (False, True))
    assert cached <= online


@pytest.mark.parametrize("objective", [KTO, TYPO])
def test_further_responses_count(objective):
    assert memory(module(LORA, objective)).peak > memory(module(LORA)).peak
    n = {KTO: 4, TYPO: 3}[objective]
    assert Load(2, 5, 40).tokens(objective.needs) == 2 * (5 + n * 39)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_masks_are_fake_and_grow_with_the_square(attention):
    of = module(LORA, attention=attention)
    with planner(of, config()) as found:
        one, two, four = (found(Load(n, 200, 400)).peak for n in (1, 2, 4))
    assert four - two > 2.2 * (two - one)


def test_an_optimiser_without_moments_has_none():
    assert MOMENTS not in memory(module(optimizer=torch.optim.SGD)).held


class ByValue(torch.optim.SGD):
    def step(self, closure=None):
        if self.param_groups[0]["params"][0].grad.sum().item() > 0:
            super().step(closure)


def test_what_depends_on_values_is_refused_by_name():
    with pytest.raises(InputError, match=r"model.optimizer \(ByValue\) cannot be planned"):
        memory(module(optimizer=ByValue))


@pytest.mark.parametrize("limit", [0, 99, 100, 110, 555, 556, 1000, 5000])
@pytest.mark.parametrize("start", [1, 7, 60])
def test_the_search_finds_the_most_pairs(limit, start):
    def peak(n):
        return 90 + 10 * n + (n > 20) * 7

    seen = []

    def counted(n):
        seen.append(n)
        return peak(n)

    found = most_pairs(counted, limit, start, peak(start), 90, 64)
    assert len(seen) <= 4
    most = max((n for n in range(1, 65) if peak(n) <= limit), default=0)
    assert most - 1 <= found <= most


def test_role_counts():
    assert Load(1, 2, 3, "padded").tokens(Needs(roles=(Role.GOLD,))) == 3 * 4
