"""A base of 4 or 8 bits is the base of its dequantised weights, forwards and backwards."""

import copy
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rotopo.cli import run
from rotopo.data.batch import collate
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.export.command import export
from rotopo.models.loading import load_as_set, load_model
from rotopo.models.policy import Policy
from rotopo.models.quantized import ADAPTERS, compute_as_in_training, quantized
from rotopo.models.settings import PolicyConfig
from rotopo.rotation import RotationConfig
from rotopo.run import checkpoints
from tests.models.families import make
from tests.models.test_policy import some_rows
from tests.rotation.test_tuner import OneLayer, matrix_of, randomise
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, last_checkpoint

LORA = LoraConfig(target_modules=["q_proj"])
KINDS = ("4bit", "8bit")
FEW, MANY = 3, 200  # tokens: fewer and more than a layer's outputs


@pytest.mark.parametrize(
    ("settings", "sharding", "message"),
    [
        ({"quantize": "2bit"}, None, "4bit or 8bit"),
        ({"adapter": None}, None, "cannot be trained itself"),
        ({"adapter": peft.HRAConfig()}, None, "HRAConfig cannot work on quantised"),
        ({"adapter": LoraConfig(init_lora_weights="pissa")}, None, "'pissa' starts from"),
        ({"adapter": LoraConfig(use_dora=True), "quantize": "8bit"}, None, "use_dora"),
        ({"compile": True}, None, "compile do not go together"),
        ({"dtype": "float64"}, None, "float64"),
        ({"quantize": "8bit"}, SimpleNamespace(offload=False), "8bit.*divided.*ddp"),
        ({}, SimpleNamespace(offload=True), "cpu_offload"),
    ],
)
def test_what_cannot_be_quantised_is_refused(settings, sharding, message):
    config = PolicyConfig(**{"adapter": LORA, "quantize": "4bit"} | settings)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    with pytest.raises(InputError, match=rf"policy\.quantize.*{message}"):
        quantized(config, dtype, sharding)


def test_quantising_without_its_package_says_which(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'rotopo\[quantize\]'"):
        quantized(PolicyConfig(adapter=LORA, quantize="8bit"), torch.float32)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(bnb, tmp_path_factory) -> Path:
    """A model whose layers bitsandbytes would repack in evaluation: by 32 outputs."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make("llama", hidden_size=64, intermediate_size=96, dtype=torch.float32).save_pretrained(folder)
    return folder


def settings_of(folder: Path, kind: str, adapter=LORA, **settings) -> PolicyConfig:
    return PolicyConfig(
        path=str(folder), adapter=adapter, quantize=kind, **{"dtype": "float32"} | settings
    )


def linear_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """64 inputs, 96 outputs and a bias."""
    import bitsandbytes

    torch.manual_seed(1)
    plain = nn.Linear(64, 96)
    layer: nn.Linear
    if kind == "4bit":
        layer = bitsandbytes.nn.Linear4bit(64, 96, compute_dtype=dtype, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 96, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.state_dict())
    layer = layer.requires_grad_(False).to("cpu")
    layer.bias.data = layer.bias.to(dtype)
    return layer


def dequantised(layer: nn.Linear) -> Tensor:
    """By bitsandbytes' own functions."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if type(layer).__name__ == "Linear4bit":
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, scales)


def rotated(layer: nn.Linear, adapters: int = 1) -> nn.Module:
    model = OneLayer(layer)
    compute_as_in_training(model)
    tuner = get_peft_model(model, RotationConfig(target_modules=["linear"]))
    for name in ("second",)[: adapters - 1]:
        tuner.add_adapter(name, RotationConfig(target_modules=["linear"]))
        tuner.base_model.set_adapter(["default", name])
    return model.linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_rotation_of_a_quantised_layer_is_the_formula(bnb, kind, tokens, adapters):
    layer = rotated(linear_of(kind), adapters)
    randomise(layer)
    W, b = dequantised(layer.base_layer).double(), layer.base_layer.bias.double()
    x = torch.randn(2, tokens, 64, requires_grad=True)
    expected = x.double()
    for name in layer.active_adapters[::-1]:
        expected = expected @ matrix_of(layer, name)[0].T
    s = torch.stack([matrix_of(layer, name)[1] for name in layer.active_adapters]).prod(0)
    torch.testing.assert_close(layer(x).double(), s * (expected @ W.T) + b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_its_gradients_are_those_of_the_dequantised_layer_in_float64(bnb, kind, tokens):
    layer = rotated(linear_of(kind), adapters=2)
    randomise(layer)
    twin = nn.Linear(64, 96).double()
    twin.load_state_dict({"weight": dequantised(layer.base_layer), "bias": layer.base_layer.bias})
    exact = rotated(twin, adapters=2).double()
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    others = dict(exact.named_parameters())
    for name, parameter in trained.items():
        others[name].data = parameter.detach().double()
    x, grad = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 96)
    found = torch.autograd.grad(layer(x), [x, *trained.values()], grad)
    wide = x.detach().double().requires_grad_()
    inputs = [wide, *(others[name] for name in trained)]
    expected = torch.autograd.grad(exact(wide), inputs, grad.double())
    for name, a, b in zip(["x", *trained], found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max(), msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_identity_bit_for_bit(bnb, kind, tokens, dtype):
    layer = rotated(linear_of(kind, dtype))
    x = torch.randn(tokens, 64, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_it_keeps_what_goes_in_and_comes_out_and_no_stage_between(bnb):
    layer = rotated(linear_of("4bit", torch.bfloat16))
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    factors = 100_000
    assert sum(kept.values()) < x.nbytes + y.nbytes + factors < 1.2 * (x.nbytes + y.nbytes)


def test_merging_into_a_quantised_weight_is_refused(bnb):
    layer = rotated(linear_of("4bit"))
    with pytest.raises(InputError, match="Merging default into a quantised weight"):
        layer.merge()


def dequantised_twin(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantised = dict(model.named_modules())
    for name, layer in twin.named_modules():
        if type(quantised[name]).__name__ in ("Linear4bit", "Linear8bitLt"):
            layer.weight.data = dequantize_module_weight(quantised[name])
    return twin


SMALL = {
    peft.BOFTConfig: {"boft_block_size": 4},
    peft.IA3Config: {"feedforward_modules": []},
    peft.OFTConfig: {"oft_block_size": 4},
    peft.GraloraConfig: {"r": 8},
    peft.RoadConfig: {"group_size": 8},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_adapters_see_the_dequantised_weights(folder, kind, adapter):
    config = adapter(target_modules=["q_proj", "v_proj"], **SMALL.get(adapter, {}))
    model, *_ = load_as_set(load_model, settings_of(folder, kind, config), None)
    models = [model, dequantised_twin(model, folder)]
    ids, grads, logits = torch.arange(3, 33).view(2, 15), [], []
    for one in models:
        torch.manual_seed(0)
        adapted = get_peft_model(one, copy.deepcopy(config)).train()
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        logits.append(adapted(input_ids=ids).logits)
        logits[-1].square().sum().backward()
        grads.append({name: p.grad for name, p in trained.items()})
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [LORA, RotationConfig()], ids=["LoRA", "rotation"])
def test_before_training_policy_and_reference_are_the_same(folder, kind, adapter):
    policy = Policy.load(settings_of(folder, kind, adapter), needs_reference=True)
    for mode in (True, False):
        log_probs = policy.train(mode)(collate(some_rows(), 0, "packed", 1.0), Needs())
        assert torch.equal(log_probs.chosen, log_probs.reference_chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_leaves_training_as_it_was(folder, kind):
    """On a processor with bfloat16 bitsandbytes would repack the weights for good, and leave their
    products without a gradient."""
    model, *_ = load_as_set(load_model, settings_of(folder, kind), None)
    get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))

    def step() -> tuple[Tensor, Tensor]:
        logits = model.train()(input_ids=torch.arange(3, 20)[None]).logits
        return logits, *torch.autograd.grad(logits.sum(), trained)

    trained = [p for p in model.parameters() if p.requires_grad][:1]
    before = step()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=torch.arange(3, 20)[None]).logits
    assert torch.equal(evaluated, before[0])
    assert all(map(torch.equal, before, step()))


def test_bases_are_known_by_their_own_weights_and_their_bits(folder, tmp_path):
    policies = {
        kind: Policy.load(settings_of(folder, kind), needs_reference=False)
        for kind in (None, *KINDS)
    }
    plain = policies[None].base_fingerprint
    assert [p.base_fingerprint for p in policies.values()] == [
        plain,
        f"{plain}-4bit",
        f"{plain}-8bit",
    ]
    assert len({p.reference_fingerprint for p in policies.values()}) == 3
    # The packed numbers are the same here: only their scales differ.
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.model.layers[0].mlp.up_proj.weight.data *= 2
    other.save_pretrained(tmp_path)
    again = Policy.load(settings_of(tmp_path, "4bit"), needs_reference=False)
    assert again.base_fingerprint != f"{plain}-4bit"


def test_a_quantised_layer_is_not_trained_whole(folder):
    whole = LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(InputError, match=r"modules_to_save: .*up_proj is quantised"):
        Policy.load(settings_of(folder, "4bit", whole), needs_reference=False)


def test_what_is_quantised_already_is_not_quantised_again(folder, tmp_path):
    load_as_set(load_model, settings_of(folder, "4bit"), None)[0].save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"policy\.quantize.*already"):
        load_as_set(load_model, settings_of(tmp_path, "4bit"), None)


@pytest.mark.slow
def test_a_run_on_a_quantised_base_goes_on_predicts_and_is_exported(
    bnb, tmp_path, tiny_tokenizer, capsys
):
    config = save_config(tmp_path, tiny_tokenizer)
    adapter = "--model.policy.adapter=rotopo.rotation.RotationConfig"
    common = ["--config", str(config), adapter, *CHECKPOINTS]
    four = "--model.policy.quantize=4bit"

    def fit(root: str, *options: str) -> dict[str, Tensor]:
        run(["fit", *common, four, f"--trainer.default_root_dir={tmp_path / root}", *options])
        file = last_checkpoint(tmp_path / root)
        return checkpoints.read(file)["state_dict"]

    whole = fit("whole")
    (half,) = (tmp_path / "whole").rglob("epoch=0-step=3.ckpt")
    resumed = fit("resumed", f"--ckpt_path={half}")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    last = last_checkpoint(tmp_path / "whole")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(["test", *common, "--model.policy={quantize: null}", f"--ckpt_path={last}"])
    assert "model.policy.quantize is null here and 4bit" in capsys.readouterr().err
    run(["predict", *common, four, f"--ckpt_path={last}", f"--trainer.default_root_dir={tmp_path}"])
    (responses,) = tmp_path.rglob("responses.jsonl")
    assert len(responses.read_text().splitlines()) == 12
    for form in ("merged", "adapter"):
        export(last.parents[1], tmp_path / form, form=form, checkpoint=last)
        assert "in full precision" in (tmp_path / form / "README.md").read_text()
