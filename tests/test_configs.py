"""Files that go on top of the quickstart, and those of configs/papers as they stand."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PretrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

import rotopo.models.loading
import rotopo.models.policy
import rotopo.models.scorer
from rotopo import objectives
from rotopo.lightning_cli import RotopoCLI, run
from rotopo.models.sharding import decoder_layers
from rotopo.objectives.base import PreferenceModule
from rotopo.parsing import keep_only_what_classes_share
from rotopo.reward import RewardModule
from rotopo.training import Warmup

Build = Callable[..., RotopoCLI]

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
OBJECTIVES = sorted((CONFIGS / "objectives").glob("*.yaml"))
PAPERS = sorted((CONFIGS / "papers").glob("*.yaml"))
REWARD_MODEL = CONFIGS / "reward_model.yaml"
NOISE = CONFIGS / "noise.yaml"

# Files that set DPO up in another way, and what they set.
VARIANTS = {
    "cdpo": {"label_smoothing": 0.1},
    "f_dpo": {"divergence": "js"},
    "dpo_norm": {"beta": 5.0, "normalise_length": True},
    "wpo": {"beta": 0.01, "wpo": True},
}

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
MISTRAL_7B = MistralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    sliding_window=4096,
    tie_word_embeddings=False,
)
QWEN_2_5_HALF_B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SMOLLM_3_3B = SmolLM3Config(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    tie_word_embeddings=True,
    pad_token_id=128004,
)
OLMO_3_7B = Olmo3Config(
    vocab_size=100278,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
    pad_token_id=100277,
    bos_token_id=None,
    eos_token_id=100257,
)
# The models that the papers' files name, and their parameters.
MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "princeton-nlp/Llama-3-Base-8B-SFT": (LLAMA_3_8B, 8_030_261_248),
    "alignment-handbook/zephyr-7b-sft-full": (MISTRAL_7B, 7_241_732_096),
    "Qwen/Qwen2.5-0.5B-Instruct": (QWEN_2_5_HALF_B, 494_032_768),
    "mistralai/Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "RLHFlow/LLaMA3-SFT": (LLAMA_3_8B, 8_030_261_248),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LLAMA_3_8B, 8_030_261_248),
    # But for the rows that Tulu's padding token has added.
    "allenai/Llama-3.1-Tulu-3-8B-SFT": (LLAMA_3_8B, 8_030_261_248),
    "models/SmolLM3-3B-it-SFT": (SMOLLM_3_3B, 3_075_098_624),
    "allenai/Olmo-3-7B-Instruct-SFT": (OLMO_3_7B, 7_298_011_136),
}
# 32 layers of q (4096 → 4096) and v (4096 → 1024), each with two sweeps of 4095 angles and two
# Householder vectors, and a magnitude per output.
ROTATION = 32 * (2 * (2 * 4095 + 2 * 4096) + 4096 + 1024)
# Where a value of a paper's file comes from: [ours], [paper], ...
MARK = re.compile(r"\[([\w-]+)\]")


def name_of(file: Path) -> str:
    return file.stem


def class_of(file: Path) -> type[PreferenceModule]:
    path = yaml.safe_load(file.read_text("utf-8"))["model"]["class_path"]
    assert path.rpartition(".")[0] == "rotopo.objectives"
    return getattr(objectives, path.rpartition(".")[2])


def own_settings(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """What a class declares itself."""
    if "__init__" not in vars(cls):
        return {}
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    return {p.name: p for p in named}


def settings_in(file: Path) -> dict:
    return yaml.safe_load(file.read_text("utf-8"))["model"].get("init_args", {})


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Iterator[Build]:
    """What the command line builds of files, without running it and whatever the machine."""
    folder = tmp_path_factory.mktemp("runs")
    machine = [
        "accelerator=cpu",
        "devices=1",
        "num_nodes=1",
        "strategy=auto",
        f"default_root_dir={folder}",
    ]

    def built(*files: Path) -> RotopoCLI:
        return run(
            ["fit", *(f"--config={file}" for file in files), *(f"--trainer.{m}" for m in machine)]
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RotopoCLI, "_run_subcommand", lambda self, subcommand: None)
        yield built


@pytest.fixture(scope="module")
def quickstart(build: Build) -> dict[str, Any]:
    """The quickstart's settings."""
    return build(QUICKSTART).config["fit"].as_dict()


def test_every_objective_has_a_file_and_no_file_is_left_over():
    names = [class_of(file).__name__ for file in OBJECTIVES if file.stem not in VARIANTS]
    assert sorted(names) == sorted(objectives.__all__)
    assert {file.stem for file in OBJECTIVES} >= VARIANTS.keys()


def test_every_objective_is_in_the_readmes_table():
    rows = re.findall(
        r"^\| `(\w+)`", (CONFIGS.parent / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert set(rows) >= set(objectives.__all__)


@pytest.mark.parametrize("file", OBJECTIVES, ids=name_of)
def test_a_file_writes_out_its_classes_own_defaults(file):
    given, own = settings_in(file), own_settings(class_of(file))
    if file.stem in VARIANTS:
        assert given == VARIANTS[file.stem]
        assert all(given[name] != own[name].default for name in given)
        return
    assert given.keys() == own.keys()
    for name, parameter in own.items():
        if parameter.default is not parameter.empty:
            assert given[name] == parameter.default, name
            assert type(given[name]) is type(parameter.default), name


@pytest.mark.parametrize("file", OBJECTIVES, ids=name_of)
def test_an_objective_goes_on_top_of_the_quickstart_and_leaves_the_rest_of_it(
    file, build, quickstart
):
    cli = build(QUICKSTART, file)
    after = cli.config["fit"].as_dict()
    assert type(cli.model) is class_of(file)
    for name, value in settings_in(file).items():
        if name != "objectives":  # of which the file writes only a part
            assert after["model"]["init_args"][name] == value
    for shared in ("policy", "optimizer", "scheduler", "sampling"):
        assert after["model"]["init_args"][shared] == quickstart["model"]["init_args"][shared]
    for rest in ("data", "trainer", "seed_everything"):
        assert after[rest] == quickstart[rest]


def test_the_reward_model_goes_on_top_of_the_quickstart(build, quickstart):
    cli = build(QUICKSTART, REWARD_MODEL)
    after = cli.config["fit"].as_dict()
    assert type(cli.model) is RewardModule
    backbone, policy = cli.model.backbone_config, quickstart["model"]["init_args"]["policy"]
    assert backbone.path == policy["path"] == cli.datamodule.pairs.tokenizer_path
    assert type(backbone.adapter).__name__ == "LoraConfig"
    scheduler = quickstart["model"]["init_args"]["scheduler"]
    assert after["model"]["init_args"]["scheduler"] == scheduler
    expected = quickstart["data"]["init_args"] | {"tokenizer": backbone.path}
    assert after["data"]["init_args"] == expected


def test_lora_takes_the_rotations_place_and_leaves_the_rest_of_the_quickstart(build, quickstart):
    cli = build(QUICKSTART, CONFIGS / "adapters" / "lora.yaml", CONFIGS / "align.yaml")
    adapter = cli.model.policy_config.adapter
    assert type(adapter).__name__ == "LoraConfig"
    assert adapter.target_modules == {"q_proj", "v_proj"}
    after = cli.config["fit"].as_dict()
    assert after["data"] == quickstart["data"]
    for shared in ("beta", "scheduler", "sampling"):
        assert after["model"]["init_args"][shared] == quickstart["model"]["init_args"][shared]
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert names >= {"ModelCheckpoint", "LearningRateMonitor"}


def test_two_givens_factors_take_the_reflections_place_and_leave_the_rest(build, quickstart):
    cli = build(QUICKSTART, CONFIGS / "adapters" / "rotation_two_givens.yaml")
    adapter = cli.model.policy_config.adapter
    assert type(adapter).__name__ == "RotationConfig"
    assert (adapter.n_householder, adapter.givens_factors, adapter.givens) == (
        0,
        2,
        "bidirectional",
    )
    after = cli.config["fit"].as_dict()
    for shared in ("beta", "optimizer", "scheduler", "sampling"):
        assert after["model"]["init_args"][shared] == quickstart["model"]["init_args"][shared]
    assert after["data"] == quickstart["data"]


def test_the_noise_studys_file_goes_on_top_of_lora(build):
    cli = build(QUICKSTART, CONFIGS / "adapters" / "lora.yaml", NOISE)
    assert type(cli.model.policy_config.adapter).__name__ == "LoraConfig"
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = cli.model.optimizer([weight])
    scheduler = cli.model.scheduler(optimizer, total_steps=10)
    for _ in range(20):  # longer than planned, or shorter, at one rate
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == scheduler.base_lrs
    (table,) = cli.trainer.loggers
    assert isinstance(table, CSVLogger)
    assert any(type(c).__name__ == "ModelCheckpoint" for c in cli.trainer.callbacks)


def test_the_mixtures_parts_are_what_their_own_files_say(build):
    parts = build(QUICKSTART, CONFIGS / "objectives" / "mixture.yaml").model.parts
    assert [type(part) for part in parts] == [objectives.DPO, objectives.SFT]
    assert parts[0].beta == settings_in(CONFIGS / "objectives" / "dpo.yaml")["beta"]


def test_variants_of_one_class_add_up(build):
    files = [CONFIGS / "objectives" / f"{name}.yaml" for name in ("wpo", "cdpo", "dpo_norm")]
    model = build(QUICKSTART, *files).model
    assert (model.wpo, model.label_smoothing, model.normalise_length) == (True, 0.1, True)
    assert model.wpo_clamp
    assert model.beta == 5.0  # of the last file; WPO's own is below DPO's


def test_simpos_beta_is_its_own_after_a_dpo_file_that_set_another(build, tmp_path):
    dpo = tmp_path / "dpo.yaml"
    dpo.write_text("model: {class_path: rotopo.objectives.DPO, init_args: {beta: 0.3}}")
    swap = tmp_path / "simpo.yaml"
    swap.write_text("model: {class_path: rotopo.objectives.SimPO}")
    assert build(QUICKSTART, dpo).model.beta == 0.3
    for simpo in (swap, CONFIGS / "objectives" / "simpo.yaml"):
        model = build(QUICKSTART, dpo, simpo).model
        assert (type(model), model.beta, model.gamma) == (objectives.SimPO, 2.0, 1.0)
        assert model.policy_config.path.startswith("package:")
        assert model.optimizer is not None


@pytest.fixture(scope="module")
def parser() -> jsonargparse.ArgumentParser:
    """The command line's rule for class swaps, on the module alone: 700 pairs take seconds."""
    keep_only_what_classes_share()
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(PreferenceModule, "model")
    return parser


def another(parameter: inspect.Parameter) -> str:
    """A value of a setting's type that is not its default."""
    if parameter.name == "objectives":
        return "[{class_path: rotopo.objectives.NCA}]"
    if isinstance(parameter.default, bool):
        return str(not parameter.default).lower()
    if isinstance(parameter.default, str):
        choices = parameter.annotation.__args__
        return next(choice for choice in choices if choice != parameter.default)
    if parameter.default is None:
        return "[3.0]"
    return str(type(parameter.default)(parameter.default + 7))


@pytest.mark.parametrize("old", objectives.__all__)
def test_nothing_of_an_objectives_own_survives_a_swap_to_any_other(old, parser):
    path = "--model.policy.path=somewhere"
    changed = [
        f"--model.{p.name}={another(p)}" for p in own_settings(getattr(objectives, old)).values()
    ]
    for new in objectives.__all__:
        if new == old:
            continue
        required = ["--model.objectives=[{class_path: rotopo.objectives.DPO}]"]
        swap = [f"--model=rotopo.objectives.{new}", *(required if new == "Mixture" else [])]
        parsed = parser.parse_args([f"--model=rotopo.objectives.{old}", path, *changed, *swap])
        after = vars(parsed.model.init_args)
        assert parsed.model.class_path == f"rotopo.objectives.{new}"
        assert after["policy"].path == "somewhere"
        own = own_settings(getattr(objectives, new))
        defaults = {n: p.default for n, p in own.items() if n != "objectives"}
        assert {name: after[name] for name in defaults} == defaults


class OnMeta:
    """Stands in for a loader of Hugging Face models: the right shapes, and no weights."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def from_pretrained(
        self,
        folder,
        config,
        dtype,
        attn_implementation,
        trust_remote_code,
        output_loading_info=False,
    ):
        with torch.device("meta"):
            model = self.loader.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )
        return (model, {"missing_keys": {"score.weight"}}) if output_loading_info else model


@pytest.fixture
def without_weights(monkeypatch, tmp_path):
    """Models of :data:`MODELS` by their names on the Hub, on the meta device, offline."""

    def folder_of(path: str) -> str:
        folder = tmp_path / path
        if not folder.exists():
            config, _ = MODELS[path]
            config.save_pretrained(folder)
        return str(folder)

    # Else each model's name is asked for at the Hub, for half a minute where there is none.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(rotopo.models.loading, "pretrained_folder", folder_of)
    monkeypatch.setattr(rotopo.models.loading, "AutoModelForCausalLM", OnMeta(AutoModelForCausalLM))
    monkeypatch.setattr(rotopo.models.scorer, "pretrained_folder", folder_of)
    monkeypatch.setattr(
        rotopo.models.scorer,
        "AutoModelForSequenceClassification",
        OnMeta(AutoModelForSequenceClassification),
    )
    # There is nothing to take a fingerprint of.
    monkeypatch.setattr(rotopo.models.policy, "fingerprint", lambda *_: "meta")
    monkeypatch.setattr(rotopo.models.scorer, "fingerprint", lambda *_: "meta")


@pytest.mark.parametrize("file", PAPERS, ids=name_of)
def test_a_papers_file_builds_on_the_meta_device(file, build, without_weights):
    cli = build(file)
    with torch.device("meta"):
        cli.model.configure_model()
    rewards = isinstance(cli.model, RewardModule)
    model = cli.model.scorer if rewards else cli.model.policy
    settings = cli.model.backbone_config if rewards else cli.model.policy_config
    config, size = MODELS[settings.path]
    if rewards:  # a number from each hidden state, and no word
        head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        size += config.hidden_size - head
    parameters = list(model.model.parameters())
    assert all(p.is_meta for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    if settings.adapter is None:
        assert (trained, frozen) == (size, 0)
        assert (model.reference is not None) == cli.model.needs.reference
    else:
        assert (trained, frozen) == (ROTATION, size)
        assert model.reference is None
    if "FSDP2" in file.read_text("utf-8"):  # the model says which of its layers are units
        assert len(decoder_layers(model.language_model)) == config.num_hidden_layers
    optimizer = cli.model.optimizer([p for p in parameters if p.requires_grad])
    assert isinstance(cli.model.scheduler(optimizer, total_steps=100), Warmup)


def test_ropos_parameters_on_llama_3_are_the_published_share():
    assert ROTATION == 1_212_288
    assert f"{ROTATION / MODELS['princeton-nlp/Llama-3-Base-8B-SFT'][1]:.5%}" == "0.01510%"


@pytest.mark.parametrize(("name", "lr", "decay"), [("", 1e-6, 0.05), ("_reward_model", 2e-5, 0.0)])
def test_the_alignment_reports_files_are_its_7107_steps(name, lr, decay):
    file = CONFIGS / "papers" / f"alignment_report_qwen2.5_0.5b_align_anything{name}.yaml"
    config = yaml.safe_load(file.read_text("utf-8"))
    trainer, data = config["trainer"], config["data"]["init_args"]
    assert 28_430 // data["pairs_per_step"] * trainer["max_epochs"] == 7_107
    assert data["pairs_per_step"] == 2 * trainer["accumulate_grad_batches"] * trainer["devices"]
    optimizer = config["model"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (lr, decay)
    assert trainer["gradient_clip_val"] == 1.0


@pytest.mark.parametrize("file", PAPERS, ids=name_of)
def test_a_papers_file_leaves_nothing_important_to_a_default(file):
    config = yaml.safe_load(file.read_text("utf-8"))
    assert isinstance(config["seed_everything"], int)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    trainer = config["trainer"]
    policy = "backbone" if config["model"]["class_path"].endswith("RewardModule") else "policy"
    loss = {"margin", "centering", "l2"} if policy == "backbone" else {"beta"}
    loss = set() if config["model"]["class_path"].endswith("SFT") else loss
    assert model.keys() >= {policy, "optimizer", "scheduler"} | loss
    assert {"path", "adapter", "dtype"} <= model[policy].keys()
    assert {"lr", "weight_decay"} <= model["optimizer"]["init_args"].keys()
    assert {"source", "format", "validation", "pairs_per_step", "max_length"} <= data.keys()
    assert {"devices", "strategy", "max_epochs", "gradient_clip_val"} <= trainer.keys()
    assert "precision" not in trainer  # the dtype is the policy's
    ranks = trainer["devices"] * trainer.get("num_nodes", 1)
    assert data["pairs_per_step"] % (ranks * trainer["accumulate_grad_batches"]) == 0
    checkpoint, *others = (callback["class_path"] for callback in trainer["callbacks"])
    assert checkpoint.endswith(".ModelCheckpoint")
    assert others == (["rotopo.robust.Alternation"] if "ropo_robust" in file.stem else [])


@pytest.mark.parametrize("file", PAPERS, ids=name_of)
def test_a_papers_file_says_which_values_are_ours_and_where_the_others_come_from(file):
    head, _, body = file.read_text("utf-8").partition("seed_everything")
    explained = set(re.findall(r"^# \[([\w-]+)\] ", head, re.MULTILINE))
    marks = {mark for comment in re.findall(r" # (.*)", body) for mark in MARK.findall(comment)}
    assert "ours" in marks
    assert marks == explained


@pytest.mark.parametrize(
    "file", [*OBJECTIVES, *PAPERS, REWARD_MODEL, NOISE, CONFIGS / "small.yaml"], ids=name_of
)
def test_a_file_begins_with_what_it_is_and_its_lines_are_short(file):
    lines = file.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONFIGS / "strategies").glob("*")))
def test_a_strategy_goes_on_top_of_any_file_and_leaves_the_rest_of_it(name, quickstart):
    """Parsed and not built: FSDP1 would be refused without a GPU."""
    file = CONFIGS / "strategies" / f"{name}.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RotopoCLI, "instantiate_classes", lambda self: None)
        patch.setattr(RotopoCLI, "_run_subcommand", lambda self, subcommand: None)
        cli = run(["fit", f"--config={QUICKSTART}", f"--config={file}"])
    after = cli.config["fit"].as_dict()
    assert after["model"] == quickstart["model"]
    assert after["data"] == quickstart["data"]
    assert after["trainer"]["callbacks"] == quickstart["trainer"]["callbacks"]
    assert after["trainer"]["strategy"]["class_path"].endswith("Strategy")
