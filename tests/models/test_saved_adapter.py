"""An adapter's folder as the policy's path: it goes on training, or another one goes on top; the
reference is the model that it makes of its base. Against plain models of transformers and PEFT."""

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from rotopo.errors import InputError
from rotopo.models.merging import WideLinear
from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig
from rotopo.rotation import RotationConfig
from tests.models.families import FAMILIES
from tests.models.test_start import BATCH, LAYERS, ROWS, Fit, log_probs, own_log_prob
from tests.small_run import save_pairs

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0),
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A tiny model, pairs of it, and an adapter that somebody has trained with PEFT."""
    made = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    torch.manual_seed(0)
    # Whose code stays in float64, which Llama's norms do not.
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    config = OPTConfig(**FAMILIES["opt"] | size)
    OPTForCausalLM(config).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    save_pairs(made / "pairs.jsonl", 20)
    save_adapter(made, made / "sft")
    return made


def save_adapter(folder: Path, name: Path, scale: float = 1.0, **settings) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_dropout": 0.1, **LAYERS, **settings})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * 0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(name, save_embedding_layers=False)
    return name


def plain(folder: Path, dtype: torch.dtype, name: str = "sft") -> PeftModel:
    """What the adapter's folder is, by PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    return PeftModel.from_pretrained(base, folder / name, is_trainable=True).eval().to(dtype)


def steps_by_hand(model, reference, data, optimizer: str, beta: float, steps: int = 3):
    """DPO's steps on two separate models, written out; the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = OPTIMISERS[optimizer](trained)
    losses = []
    for rows in data[:steps]:
        loss = 0.0
        for row in rows:
            ratios = []
            for ids in row.responses:
                tokens = torch.tensor([row.prompt + ids])
                place = (range(len(row.prompt) - 1, tokens.shape[1] - 1), ids)
                own, other = (
                    m(tokens).logits[0].log_softmax(-1)[place].sum() for m in (model, reference)
                )
                ratios.append(own - other.detach())
            loss = loss - nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])) / len(rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def rows_in_order(fit: Fit) -> list:
    """The rows of each step of a fit, from its own loader."""
    data = fit.module.trainer.datamodule
    rows = data.rows("train")
    return [[rows[i] for i in places] for places in fit.seen]


WAYS = {
    "goes-on": None,
    "lora-on-top": LoraConfig(r=2, target_modules=["q_proj", "out_proj"]),
    "rotation-on-top": RotationConfig(),
}


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("way", WAYS)
def test_three_steps_end_in_the_weights_of_two_plain_models(folder, way, optimizer, reference):
    dtype = torch.float32 if optimizer == "sgd" else torch.float64
    limit = {"rtol": 0, "atol": 1e-5 if optimizer == "sgd" else 1e-10}
    config = PolicyConfig(str(folder / "sft"), WAYS[way], dtype=str(dtype)[6:], reference=reference)
    # Dropout would be drawn in another order.
    saved = save_adapter(folder, folder / "plain", lora_dropout=0.0)
    config = PolicyConfig(**{**vars(config), "path": str(saved)})
    start = plain(folder, dtype, "plain")
    before = copy.deepcopy(start)
    if way != "goes-on":
        torch.manual_seed(0)
        merged = copy.deepcopy(start).merge_and_unload()
        start = get_peft_model(merged, copy.deepcopy(WAYS[way])).eval().to(dtype)
    fit = Fit(folder, config, optimizer=OPTIMISERS[optimizer], name=f"{way}-{dtype}-{reference}")
    mine = {n: p for n, p in fit.policy.model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # the new one's random start, as the fit had it
        for name, parameter in start.named_parameters():
            if parameter.requires_grad and way != "goes-on":
                parameter.copy_(fit.first[name])
    losses = steps_by_hand(start, before, rows_in_order(fit), optimizer, 0.3)
    assert fit.losses[0] == pytest.approx(math.log(2), abs=1e-7 if reference == "online" else 1e-5)
    torch.testing.assert_close(torch.tensor(fit.losses), torch.tensor(losses), rtol=0, atol=1e-5)
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(mine[name], parameter, **limit)
            assert not torch.equal(parameter, fit.first[name])


def test_its_reference_is_the_adapter_as_it_was(folder):
    policy = Policy.load(PolicyConfig(str(folder / "sft"), dtype="float32"), True)
    found = log_probs(policy)
    assert torch.equal(found[:2], found[2:])
    model = plain(folder, torch.float32)
    own = torch.stack([own_log_prob(model, row, k) for k in (0, 1) for row in ROWS]).view(2, -1)
    torch.testing.assert_close(found[2:].double(), own, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    moved = log_probs(policy)
    assert torch.equal(moved[2:], found[2:])
    assert not torch.equal(moved[:2], found[:2])


def test_dropout_is_the_policys_alone(folder):
    policy = Policy.load(PolicyConfig(str(folder / "sft"), dtype="float32"), True).train()
    first, second = policy(BATCH), policy(BATCH)
    assert torch.equal(first.reference_chosen, second.reference_chosen)
    assert not torch.equal(first.chosen, second.chosen)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_merging_rounds_once_and_keeps_what_rounding_would_lose(folder, scale, recwarn):
    name = save_adapter(folder, folder / f"scaled-{scale}", scale)
    config = PolicyConfig(str(name), LoraConfig(r=2, **LAYERS), dtype="bfloat16")
    policy = Policy.load(config, needs_reference=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).float()
    exact = PeftModel.from_pretrained(model, name).merge_and_unload()
    wide = 0
    for key, weight in exact.named_parameters():
        parts = key.split(".")
        module = policy.language_model.get_submodule(".".join(parts[:-1]))
        base = getattr(module, "base_layer", module)
        stays = isinstance(base, WideLinear) and parts[-1] == "weight"
        wide += stays
        expected = weight if stays else weight.bfloat16()
        torch.testing.assert_close(getattr(base, parts[-1]), expected, rtol=0, atol=0)
    assert wide == (4 if scale < 1 else 0)
    found = log_probs(policy)
    assert torch.equal(found[:2], found[2:])
    policy(BATCH).chosen.sum().backward()


def test_a_plain_run_after_it_does_not_read_its_cache(folder):
    saved = save_adapter(folder, folder / "cached", lora_dropout=0.0)
    pissa = LoraConfig(**LAYERS, init_lora_weights="pissa")
    model = folder / "model"
    for path, adapter in ((saved, None), (model, pissa), (model, LoraConfig(**LAYERS))):
        config = PolicyConfig(
            str(path),
            adapter,
            dtype="float32",
            reference="cached",
        )
        fit = Fit(folder, config, name=f"cached-{path.name}")
        assert fit.losses[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("other", ["model", "sft"])
def test_another_model_is_the_reference(folder, other, reference):
    config = PolicyConfig(
        str(folder / "model"),
        LoraConfig(**LAYERS),
        dtype="float32",
        reference=reference,
        reference_path=str(folder / other),
    )
    fit = Fit(folder, config, name=f"other-{other}-{reference}")
    assert (fit.module.policy.reference is None) == (reference == "cached")
    assert fit.module.policy.has_reference
    found = log_probs(fit.policy)
    model = plain(folder, torch.float32)
    if other == "model":
        model = model.unload()
    own = torch.stack([own_log_prob(model, row, k) for k in (0, 1) for row in ROWS]).view(2, -1)
    torch.testing.assert_close(found[2:].double(), own, rtol=1e-5, atol=1e-4)
    ln2 = fit.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert ln2 == (other == "model")


def test_a_run_does_not_go_on_against_another_reference(folder, tmp_path):
    other = save_adapter(folder, tmp_path / "other")
    config = PolicyConfig(
        str(folder / "model"), LoraConfig(**LAYERS), "float32", reference_path=str(other)
    )
    fit = Fit(folder, config, name="referring")
    wider = PolicyConfig(**{**vars(config), "dtype": "float64"})
    Fit(folder, wider, fit.checkpoint(1), name="wider")
    save_adapter(folder, other, scale=2.0)
    with pytest.raises(InputError, match=r"policy\.reference_path .* weights have changed since"):
        Fit(folder, config, fit.checkpoint(1), name="changed")


def test_the_cache_of_a_model_serves_whoever_refers_to_it(folder):
    def fingerprint(path, adapter=None, other=None):
        config = PolicyConfig(
            str(folder / path), adapter, "float32", reference_path=other and str(folder / other)
        )
        return Policy.load(config, needs_reference=True).reference_fingerprint

    lora = LoraConfig(**LAYERS)
    assert fingerprint("model") == fingerprint("model", lora) == fingerprint("sft", None, "model")
    assert fingerprint("sft") == fingerprint("model", lora, "sft")
    pissa = LoraConfig(**LAYERS, init_lora_weights="pissa")
    found = [fingerprint("model"), fingerprint("sft"), fingerprint("sft", lora)]
    assert len({*found, fingerprint("model", pissa)}) == 4


def test_what_cannot_be_read_is_refused_by_name(folder, tmp_path):
    def message(path, adapter=None, **settings) -> str:
        with pytest.raises(InputError) as error:
            Policy.load(PolicyConfig(str(path), adapter, "float32", **settings), True)
        return str(error.value)

    other = save_adapter(folder, tmp_path / "other")
    (other / "adapter_model.safetensors").unlink()
    assert "policy.path: the adapter at" in message(other)
    nameless = save_adapter(folder, tmp_path / "nameless")
    text = (nameless / "adapter_config.json").read_text("utf-8")
    (nameless / "adapter_config.json").write_text(text.replace(str(folder / "model"), ""))
    assert "set policy.base_path" in message(nameless)
    lora = LoraConfig(**LAYERS)
    referring = message(folder / "model", lora, reference_path=str(nameless))
    assert referring.startswith("policy.reference_path: the adapter at")
    assert "in the folder's adapter_config.json" in referring
    nowhere = message(folder / "model", lora, reference_path="./nowhere")
    assert nowhere == "policy.reference_path: there is no file or folder './nowhere'."
    policy = Policy.load(
        PolicyConfig(str(nameless), dtype="float32", base_path=str(folder / "model")), True
    )
    assert policy.adapted
    assert "and" in message(folder / "model", base_path=str(folder / "model"))
    pissa = save_adapter(folder, tmp_path / "pissa", init_lora_weights="pissa")
    assert "path_initial_model_for_weight_conversion" in message(pissa)
    text = (pissa / "adapter_config.json").read_text("utf-8")
    (pissa / "adapter_config.json").write_text(text.replace('"pissa"', '"lora_ga"'))
    assert "path_initial_model_for_weight_conversion" in message(pissa)
    assert "a quantised base" in message(folder / "sft", lora, quantize="4bit")
