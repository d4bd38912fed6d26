"""Compiled decoder layers: the same numbers, in few graphs, with and without checkpointing."""

import functools

import pytest
import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from torch._dynamo.utils import counters

from rotopo.data.batch import collate
from rotopo.data.needs import Needs
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.rotation import RotationConfig
from tests.models.families import FLOAT32_INSIDE, make
from tests.models.test_policy import dpo_loss, some_rows, trained

MODULES = ["q_proj", "v_proj"]


def given(adapter: str) -> PeftConfig | None:
    """A rotation of q and v, nothing, or LoRA on the modules named."""
    if adapter == "none":
        return None
    if adapter == "rotation":
        return RotationConfig(target_modules=MODULES)
    return LoraConfig(r=2, target_modules=adapter.split(), init_lora_weights=False)


@pytest.fixture(autouse=True)
def counting():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()  # else graphs of these models count in the limits of later ones


def graphs() -> int:
    """How many there are; nothing may have stood in a compiler's way."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def policy_of(family: str, adapter, dtype: torch.dtype, **settings) -> Policy:
    torch.manual_seed(1)
    config = PolicyConfig(path="", adapter=adapter, **settings)
    policy = Policy.build(make(family, dtype), config, needs_reference=True).train()
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapter", "checkpointing"),
    [
        ("llama", "rotation", True),
        ("llama", "none", False),
        ("gpt2", "c_attn", True),
        ("gemma3_text", "q_proj", True),  # whose layers have masks of two kinds
        ("minicpm3", "q_b_proj", False),  # whose values are of another size than its keys
    ],
)
def test_families_and_adapters_compiled(family, adapter, checkpointing, monkeypatch):
    """In float64, through graphs of the forward and the backward pass as the compiler cuts them,
    without the time that it would take to make machine code of these."""
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(nn.Module, "compile", traced)
    settings = {"activation_checkpointing": checkpointing}
    plain, compiled = (
        policy_of(family, given(adapter), torch.float64, compile=on, **settings)
        for on in (False, True)
    )
    rows = some_rows()
    batches = [collate(part, 0, "packed", 1.0) for part in (rows[:3], rows[2:], rows)]
    # All forward passes first: each backward pass needs the blocks of its own batch.
    alone = Needs(reference=False)
    found = [[p(batch, alone).chosen.sum() for batch in batches] for p in (plain, compiled)]
    loose = {"rtol": 1e-4, "atol": 1e-5} if family in FLOAT32_INSIDE else {}
    for a, b in zip(*found, strict=True):
        grads = [
            torch.autograd.grad(loss, trained(p).values())
            for loss, p in zip((a, b), (plain, compiled), strict=True)
        ]
        torch.testing.assert_close((b, *grads[1]), (a, *grads[0]), **loose)
    # The first layer and the rest, of each layer type; and a rotation is folded into a weight or
    # applied to activations.
    assert graphs() <= 6


@pytest.mark.slow
def test_machine_code_gives_the_same_numbers():
    """With checkpointing, of batches of several sizes, under both policy and reference."""
    rows = some_rows(9)
    found = []
    for compiled in (False, True):
        policy = policy_of(
            "llama",
            given("q_proj v_proj"),
            torch.float32,
            compile=compiled,
            activation_checkpointing=compiled,
        )
        values = []
        for part in (rows[:3], rows[3:4], rows[2:], rows[1:6], rows[4:8], rows[:2]):
            log_probs = policy(collate(part, 0, "packed", 1.0))
            values += [log_probs.chosen, log_probs.reference_rejected]
            values += torch.autograd.grad(dpo_loss(log_probs), trained(policy).values())
        found.append(values)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # The reference, the policy's first layer, and its others.
    assert graphs() == 3
