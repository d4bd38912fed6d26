"""The rotation in PEFT's other features: what LoRA can do there, it can."""

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rotopo.errors import InputError
from rotopo.models.merging import WideLinear, merge
from rotopo.models.saved_adapter import SavedAdapter
from rotopo.rotation import RotationConfig, RotationLinear
from tests.rotation.test_tuner import (
    ACTIVATIONS,
    FOLDED,
    IDS,
    OneLayer,
    base_weight,
    layer_of,
    logits,
    matrix_of,
    randomise,
    tiny_llama,
)


def classifier() -> LlamaForSequenceClassification:
    config = copy.deepcopy(tiny_llama().config)
    config.pad_token_id, config.num_labels = 0, 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def test_a_classification_head_is_trained_saved_and_loaded(tmp_path: Path):
    model = get_peft_model(classifier(), RotationConfig(task_type="SEQ_CLS"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in trained if "score.modules_to_save.default" in n}
    assert len(head) == 1
    assert all(n in head or ".rotation_adapter." in n for n in trained)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert (expected - logits(classifier())).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(classifier()))
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-6)


def test_all_linear_finds_layers_that_are_rotated():
    model = get_peft_model(tiny_llama(), RotationConfig(target_modules=["q_proj"]))
    model.add_adapter("second", RotationConfig(target_modules="all-linear"))
    linear = {n for n, m in tiny_llama().named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    rotated = {
        name
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, RotationLinear) and "second" in module.rotation_adapter
    }
    assert rotated == linear


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(k|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]},
        {"target_modules": None},
    ],
)
def test_the_layers_are_those_of_lora(settings: dict, tmp_path: Path):
    lora = get_peft_model(tiny_llama(), LoraConfig(**settings))
    model = get_peft_model(tiny_llama(), RotationConfig(**settings))
    expected = lora.base_model.targeted_module_names
    assert expected
    assert model.base_model.targeted_module_names == expected
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"target_modules": "all-linear", "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    ],
)
def test_settings_that_lora_refuses(settings: dict):
    with pytest.raises(ValueError, match="layers_") as lora:
        LoraConfig(**settings)
    with pytest.raises(InputError) as ours:
        RotationConfig(**settings)
    assert str(ours.value) == str(lora.value)


def test_an_unknown_architecture_needs_target_modules():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(OneLayer(nn.Linear(4, 4)), RotationConfig(target_modules=None))


def test_without_init_weights_the_start_is_a_random_rotation():
    layer = layer_of(random=False, init_weights=False)
    R_t, s = matrix_of(layer)
    torch.testing.assert_close(R_t @ R_t.T, torch.eye(12, dtype=torch.float64))
    assert (R_t - torch.eye(12)).norm() > 1
    assert 0 < (s - 1).abs().max() < 0.9
    x = torch.randn(ACTIVATIONS, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), s * (x @ (base_weight(layer) @ R_t).T) + layer.bias)


@pytest.mark.parametrize("tokens", [ACTIVATIONS, FOLDED])
def test_hooks_of_the_base_layer_see_its_call(tokens: int):
    layer = layer_of()
    x = torch.randn(tokens, 12, dtype=torch.float64)
    expected = layer(x)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.base_layer.register_forward_hook(
        lambda module, args, y: seen.append((args[0].detach(), y.detach()))
    )
    torch.testing.assert_close(layer(x), expected)
    ((rows, y),) = seen
    torch.testing.assert_close(rows, x @ matrix_of(layer)[0].T)
    torch.testing.assert_close(y, F.linear(rows, layer.weight, layer.bias))
    handle.remove()
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
    s = matrix_of(layer)[1]
    torch.testing.assert_close(layer(x), (layer.bias - s * layer.bias).expand(tokens, -1))
    handle.remove()
    gradients: list[Tensor] = []
    layer.base_layer.register_full_backward_hook(lambda module, into, out: gradients.append(out[0]))
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(gradients[0], s.expand(tokens, -1))


def offload(model: nn.Module, how: str, folder: Path) -> None:
    if how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    elif how == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:  # PEFT dispatches the model again, the adapter too
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("how", ["disk", "cpu", "dispatched"])
def test_an_offloaded_base(how: str, tmp_path: Path):
    ids = torch.arange(60).view(2, 30) % 40  # more tokens than outputs
    model = get_peft_model(tiny_llama(), RotationConfig())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, ids)

    base = tiny_llama()
    offload(base, how, tmp_path / "start")
    assert torch.equal(
        logits(get_peft_model(base, RotationConfig()), ids), logits(tiny_llama(), ids)
    )

    base = tiny_llama()
    offload(base, how, tmp_path / "base")
    settings = {"offload_dir": str(tmp_path / "again")} if how == "dispatched" else {}
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", **settings)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-6)
    if how == "dispatched":
        return
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-6)
    with loaded.disable_adapter():  # which unmerges
        assert torch.equal(logits(loaded, ids), logits(tiny_llama(), ids))
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-6)

    loaded.set_adapter("default")
    for each in (loaded, model):
        each(input_ids=ids).logits.pow(2).sum().backward()
    found = {n: p.grad for n, p in loaded.named_parameters() if "rotation_" in n}
    for name, p in model.named_parameters():
        if "rotation_" in name:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [ACTIVATIONS, FOLDED])
def test_a_base_layer_with_a_forward_of_its_own(tokens: int):
    torch.manual_seed(0)
    model = OneLayer(WideLinear(48, 16))
    weight = model.linear.weight
    x = torch.randn(tokens, 48, dtype=torch.bfloat16, requires_grad=True)
    start = model(x)
    get_peft_model(model, RotationConfig(target_modules=["linear"]))
    assert torch.equal(model(x), start)
    randomise(model)
    exact = copy.deepcopy(model).double()
    exact.linear.base_layer.__class__ = nn.Linear
    wide = x.detach().double().requires_grad_()
    y, y_exact = model(x), exact(wide)
    assert y.dtype == torch.bfloat16
    assert (y - y_exact).norm() / y_exact.norm() < 0.01
    y.sum().backward()
    y_exact.sum().backward()
    exact_grads = [wide.grad, *(p.grad for p in exact.linear.rotation_adapter.parameters())]
    grads = [x.grad, *(p.grad for p in model.linear.rotation_adapter.parameters())]
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert (grad - expected).norm() / expected.norm() < 0.02
    model.linear.merge()
    assert model.linear.weight.dtype == torch.float32
    assert (model(x) - y_exact).norm() / y_exact.norm() < 0.01
    model.linear.unmerge()
    assert model.linear.weight is weight


def two_adapters(**settings) -> PeftModel:
    model = get_peft_model(tiny_llama(), RotationConfig(target_modules=["q_proj"], **settings))
    model.add_adapter("other", RotationConfig(target_modules=["q_proj", "up_proj"], **settings))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("ids", [IDS, torch.arange(120).view(3, 40) % 40])
def test_a_batch_of_several_adapters(ids: Tensor):
    model = two_adapters(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["other"].weight.mul_(2)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    alone["__base__"] = logits(tiny_llama(), ids)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
    assert torch.equal(logits(model, ids), alone["other"])  # the hooks are gone


def test_beam_search_with_several_adapters():
    model = two_adapters()
    search = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=IDS, adapter_names=names, **search)
    for row, name in enumerate(names):
        alone = model.generate(input_ids=IDS, adapter_names=[name] * 3, **search)
        assert torch.equal(mixed[row], alone[row])


def test_adapter_names_that_cannot_be():
    model = two_adapters()
    with pytest.raises(InputError, match=r"non-existing adapter\(s\): third"):
        model(input_ids=IDS, adapter_names=["third", "other", "other"])
    with pytest.raises(InputError, match="but got 1 and 3 respectively"):
        model(input_ids=IDS, adapter_names=["other"])
    model.merge_adapter()
    with pytest.raises(InputError, match="merged adapters"):
        model(input_ids=IDS, adapter_names=["other"] * 3)
    with pytest.raises(InputError, match="training mode"):
        model.train()(input_ids=IDS, adapter_names=["other"] * 3)


def test_tied_layers_are_merged_each_by_itself_and_restored():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(12, 6), "b": nn.Linear(12, 6), "tied": nn.Module()})
    model["b"].weight = model["tied"].weight = weight = model["a"].weight
    before = weight.detach().clone()
    get_peft_model(model, RotationConfig(target_modules=["a", "b"]))
    randomise(model)
    x = torch.randn(FOLDED, 12)
    rotated = [model[name](x) for name in "ab"]
    for name in "ab":
        model[name].merge()
    for name, expected in zip("ab", rotated, strict=True):
        assert torch.equal(model[name](x), expected)
    assert torch.equal(model["tied"].weight, before)
    for name in "ab":
        model[name].unmerge()
        assert model[name].weight is weight
    assert torch.equal(weight, before)
    assert {n for n, _ in model["a"].named_parameters() if "adapter" not in n} == {
        "base_layer.weight",
        "base_layer.bias",
    }


def test_the_model_card_says_what_to_import(tmp_path: Path):
    model = get_peft_model(tiny_llama(), RotationConfig())
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("`import rotopo.rotation`") == 1


def test_a_rotation_is_merged_into_a_bfloat16_base(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "model")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16"), RotationConfig()
    )
    randomise(model)
    model.save_pretrained(tmp_path / "rotation")
    exact = model.float().merge_and_unload()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    saved = SavedAdapter.at(str(tmp_path / "rotation"), None, "policy.path")
    assert saved is not None
    assert merge(base, saved, "policy", torch.bfloat16) == set()
    for name, p in base.named_parameters():
        assert torch.equal(p, exact.get_parameter(name).bfloat16()), name


def test_a_layer_that_attention_reads_past_is_refused():
    model = nn.Sequential(OrderedDict(attention=nn.MultiheadAttention(8, 2)))
    with pytest.raises(InputError, match=r"'attention\.out_proj', whose weight"):
        get_peft_model(model, RotationConfig(target_modules=["out_proj"]))
