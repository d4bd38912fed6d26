"""What layers of adapters keep of their inputs, against PEFT alone: bit for bit its gradients."""

import weakref

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rotopo.models.adapter_inputs import keep_inputs_as_they_come
from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig
from rotopo.plan.ledger import Ledger
from tests.models.families import VOCABULARY, make
from tests.models.test_start import LORA, config_of

T, D, R = 40, 32, 4  # tokens, their numbers, the adapter's rank


class Projections(nn.Module):
    """A layer's queries, keys and values."""

    def __init__(self, dtype):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, dtype=dtype) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def projections(ours, dtype=torch.bfloat16, **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=["q", "k", "v"], init_lora_weights=False, **settings)
    model = get_peft_model(Projections(dtype), config)
    if ours:
        keep_inputs_as_they_come(model)
    return model


def an_input(dtype=torch.bfloat16):
    """As of a layer behind others that train."""
    leaf = torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    return leaf.requires_grad_() * 2


def kept(model, x) -> int:
    """Bytes beside the outputs' that are there after a forward pass and were not before."""
    with Ledger(FakeTensorMode(allow_non_fake_inputs=True)) as ledger:
        ledger.name([x, *model.parameters()], "before")
        outputs = model(x)
        ledger.name(outputs, "outputs")
        return ledger.now["inputs"]


def test_of_one_input_no_copy_is_kept():
    x = an_input()
    narrow = 3 * T * R * 4  # between the adapters' two matrices, in float32
    assert kept(projections(ours=False), x) == narrow + 3 * T * D * 4
    assert kept(projections(ours=True), x) == narrow


def test_a_wide_base_is_left_as_it_is():
    x = an_input(torch.float32)
    plain, ours = (kept(projections(o, torch.float32), x) for o in (False, True))
    assert plain == ours == 3 * T * R * 4


def test_an_input_changed_before_the_backward_pass_is_an_error():
    x = an_input()
    outputs = projections(ours=True)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in outputs).backward()


def test_so_are_changed_weights_as_ever():
    model = projections(ours=True)
    outputs = model(an_input())
    with torch.no_grad():
        model.base_model.model.q.lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in outputs).backward()


def test_a_layer_that_fails_leaves_no_hooks():
    model = projections(ours=True)
    with pytest.raises(RuntimeError):
        model(an_input()[..., 1:].contiguous())
    a = torch.ones(3, requires_grad=True)
    b = a * 2
    loss = (b * b).sum()
    b.add_(1)
    with pytest.raises(RuntimeError, match="is at version 1; expected version 0"):
        loss.backward()


def test_a_forward_pass_alone_leaves_nothing_behind():
    """Of a layer that keeps a result of its own, as inverses are."""

    class Layer(BaseTunerLayer, nn.Module):
        def __init__(self):
            super().__init__()
            self.powers = nn.Parameter(torch.ones(D))

        def forward(self, x):
            result = self.powers.exp()
            self.result = weakref.ref(result)
            return x.float() * result

    layer = Layer()
    keep_inputs_as_they_come(layer)
    layer(an_input())
    assert layer._forward_hooks
    assert layer.result() is None


def test_an_input_by_name_is_left_alone():
    layer, x = projections(ours=True).base_model.model.q, an_input()
    assert torch.equal(layer(x=x), layer(x))


@pytest.mark.parametrize("other", ["", "activation_checkpointing", "compile"])
def test_what_chooses_by_itself_what_to_keep_is_left_alone(other):
    adapter = LoraConfig(r=R, target_modules="all-linear")
    config = PolicyConfig(path="", adapter=adapter, **({other: True} if other else {}))
    policy = Policy.build(make("llama", torch.bfloat16), config, needs_reference=True)
    layers = [m for m in policy.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert {bool(m._forward_pre_hooks or m._forward_hooks) for m in layers} == {not other}


def step(name: str, ours: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes after a forward pass; its logits and gradients."""
    torch.manual_seed(0)
    model = get_peft_model(make("llama", torch.bfloat16), config_of(name)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if ours:
        keep_inputs_as_they_come(model)
    ids = torch.randint(3, VOCABULARY, (2, T))
    with Ledger(FakeTensorMode(allow_non_fake_inputs=True)) as ledger:
        logits = model(input_ids=ids, use_cache=False).logits
        alive = ledger.now.total()
    logits.float().square().sum().backward()
    return alive, [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


# Which keep no float32 copy of an input in PEFT either.
NOTHING_KEPT = {
    *("ADAMSS", "BEFT", "BOFT", "DELORA", "GLORA", "IA3", "LN_TUNING", "MISS", "PSOFT", "PVERA"),
    *("ROAD", "SUPERTUNING", "TINYLORA", "VERA", "lora-dropout"),
}
# Which are no layers, or made for other models; and rotations, which are left alone.
LEFT_OUT = {
    "ROTATION",
    *("ADALORA", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "FROD", "SHIRA", "PROMPT_TUNING"),
    *("MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY", "PREFIX_TUNING", "SHADOW"),
    *("TRAINABLE_TOKENS", "XLORA"),
}
FEW = ["OFT", "IA3", "dora", "lora-dropout"]
ALL = [str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING] + [*LORA]
REST = [name for name in ALL if name not in {*FEW, *LEFT_OUT}]


@pytest.mark.parametrize(
    "name", FEW + [pytest.param(name, marks=pytest.mark.slow) for name in REST]
)
def test_the_same_gradients_from_less(name):
    (plain, expected), (less, found) = step(name, ours=False), step(name, ours=True)
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert (less == plain) if name in NOTHING_KEPT else (less < plain)
