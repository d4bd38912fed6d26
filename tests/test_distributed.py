"""Two ranks over gloo against one process: the same losses, metrics, weights and files."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rotopo.cli import run
from rotopo.export.command import export
from rotopo.run import checkpoints
from tests.callbacks.test_pair_scores import flat
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, last_checkpoint

ROTATION = ["--model.policy.adapter=rotopo.rotation.RotationConfig"]
LORA = ["--model.policy.adapter.lora_dropout=0"]
PISSA = [*LORA, "--model.policy.adapter.init_lora_weights=pissa"]
RANDOM = [*LORA, "--model.policy.adapter.init_lora_weights=orthogonal"]
REWARD = [
    "--model=rotopo.reward.RewardModule",
    "--model.centering=0.1",
    "--model.backbone.dtype=float32",
    "--model.backbone.adapter={class_path: peft.LoraConfig, init_args: {r: 4}}",
]
FULL = ["--model.policy={adapter: null, dtype: float32}"]
HALF = ["--model.policy={adapter: null, dtype: float32, compute_dtype: bfloat16}"]
# The micro-batches of two ranks: bfloat16 rounds by what is computed together.
ALONE = ["--trainer.accumulate_grad_batches=2"]
HALF_REWARD = [
    *REWARD[:2],
    "--model.backbone={adapter: null, dtype: float32, compute_dtype: bfloat16}",
]
SHARED = ["--trainer.strategy.save_distributed_checkpoint=true"]
OBJECTIVES = {
    "DPO with rotation": ROTATION,
    "reward model": REWARD,
    "KTO": ["--model=KTO", *LORA],
    "TYPO, which samples": ["--model=TYPO", *ROTATION],
    "full fine-tuning": FULL,
    "recomputed activations": [*LORA, "--model.policy.activation_checkpointing=true"],
    "cached reference": [*LORA, "--model.policy.reference=cached"],
    "geometry": [*LORA, "--trainer.callbacks+=rotopo.callbacks.Geometry"],
    "geometry of all weights": [*FULL, "--trainer.callbacks+=rotopo.callbacks.Geometry"],
    "the adapter's start as reference": PISSA,
    "4-bit base": [*ROTATION, "--model.policy.quantize=4bit"],
    "8-bit base": [*LORA, "--model.policy.quantize=8bit"],
}
# Nine of the 40 pairs are held out for validation and eleven for the test: uneven on two ranks.
SPLITS = ["--data.validation=0.225", "--data.test=0.275", "--data.eval_pairs_per_batch=2"]
COMMON = [*SPLITS, *CHECKPOINTS, "--trainer.gradient_clip_val=0.5"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_tokenizer_dir) -> Callable[..., Path]:
    """The folder of one process's run of these options, which is done once."""
    folder = tmp_path_factory.mktemp("single")
    file = save_config(folder, PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir))
    done: dict[tuple[str, ...], Path] = {}

    def folder_of(options: list[str]) -> Path:
        key = tuple(options)
        if key not in done:
            root = str(len(done))
            run(arguments(file, root, options))
            done[key] = folder / root
        return done[key]

    return folder_of


def ranks(how: str) -> list[str]:
    """Options of a strategy, on processors."""
    if how != "fsdp":
        return strategy(how)
    units = "--trainer.strategy.auto_wrap_policy=rotopo.strategies.adapter_units"
    return [*strategy(how), "--trainer.strategy=tests.on_processors.FSDPOnProcessors", units]


def arguments(config: Path, root: str, options: list[str], command: str = "fit") -> list[str]:
    model = config.parent / "model"
    reward = any("RewardModule" in option for option in options)
    path = f"--model.{'backbone' if reward else 'policy'}.path={model}"
    own = config.parent / root  # caches too, or one run would find what another has computed
    folders = [f"--trainer.default_root_dir={own}", f"--data.cache_dir={own / 'cache'}"]
    if any("reference=cached" in option for option in options):
        folders.append(f"--model.policy.reference_cache={own / 'reference'}")
    return [command, "--config", str(config), *options, path, *folders]


def logged(folder: Path) -> pd.DataFrame:
    (file,) = folder.rglob("metrics.csv")
    log = pd.read_csv(file)
    names = ("train/", "val/", "test/", "orthogonality/", "geometry/")
    return log[sorted(c for c in log if c.startswith(names))]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    file = last_checkpoint(folder)
    assert file is not None
    return checkpoints.read(file)["state_dict"]


def assert_same_run(one: Path, other: Path) -> None:
    """Logs and weights, to 1e-5 in float32."""
    pd.testing.assert_frame_equal(logged(one), logged(other), rtol=1e-5, atol=1e-5)
    expected, found = trained(one), trained(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


FEW = ("DPO with rotation", "reward model")
# Under which strategies: each objective under the one that asks most of it, and a few under more.
STRATEGIES = {
    "DPO with rotation": ["ddp", "fsdp2", "fsdp"],
    "reward model": ["fsdp2", "fsdp"],
    "KTO": ["ddp", "fsdp2"],
    "cached reference": ["ddp"],
    "geometry": ["ddp"],
    "4-bit base": ["fsdp2", "fsdp"],
    "8-bit base": ["ddp"],
}
CASES = [
    pytest.param(
        how,
        OBJECTIVES[what],
        id=f"{what}, {how}",
        marks=[] if what in FEW and how == "fsdp2" else pytest.mark.slow,
    )
    for what in OBJECTIVES
    for how in STRATEGIES.get(what, ["fsdp2"])
]


@pytest.mark.parametrize(("how", "options"), CASES)
def test_two_ranks_train_as_one_process_does(config, single, how, options):
    if any("quantize" in option for option in options):
        pytest.importorskip("bitsandbytes")
    on_ranks(2, *arguments(config, "two", [*COMMON, *options, *ranks(how)]))
    assert_same_run(single([*COMMON, *options]), config.parent / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "options"),
    [
        pytest.param(
            "fsdp2", [*HALF, "--trainer.callbacks+=rotopo.callbacks.Geometry"], id="policy, fsdp2"
        ),
        pytest.param("fsdp2", HALF_REWARD, id="reward model, fsdp2"),
        pytest.param("ddp", HALF_REWARD, id="reward model, ddp"),
    ],
)
def test_two_ranks_compute_in_bfloat16_as_one_process_does(config, single, how, options):
    """What the ranks add up they add up in float32."""
    on_ranks(2, *arguments(config, "two", [*COMMON, *options, *ranks(how)]))
    assert_same_run(single([*COMMON, *options, *ALONE]), config.parent / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "starter"), [("ddp", "torchrun"), ("fsdp2", "srun")])
def test_so_do_two_nodes(config, single, how, starter):
    """As they are told that they are: on both the local rank is 0."""
    two = arguments(config, "two", [*COMMON, *ROTATION, *ranks(how)])
    on_ranks(2, *two, starter=starter, nodes=2)
    assert_same_run(single([*COMMON, *ROTATION]), config.parent / "two")


def test_fsdp1_without_a_gpu_is_refused(config):
    with pytest.raises(RuntimeError, match=r"take configs/strategies/fsdp2\.yaml"):
        on_ranks(1, *arguments(config, "run", strategy("fsdp")))


@pytest.mark.slow
def test_fsdp1_and_8_bits_are_refused(config):
    pytest.importorskip("bitsandbytes")
    options = ["--model.policy.quantize=8bit", *strategy("fsdp")]
    with pytest.raises(RuntimeError, match="cannot divide weights of 8 bits"):
        on_ranks(1, *arguments(config, "run", options))


@pytest.mark.slow
def test_fsdp1_keeps_no_start(config):
    with pytest.raises(RuntimeError, match="cannot go back to where the adapter started"):
        on_ranks(1, *arguments(config, "run", [*PISSA, *ranks("fsdp")]))


@pytest.mark.slow
def test_fsdp1_does_not_compute_in_another_dtype(config):
    with pytest.raises(RuntimeError, match=r"policy\.compute_dtype the policy's weights"):
        on_ranks(1, *arguments(config, "run", [*HALF, *ranks("fsdp")]))


@pytest.mark.slow
def test_a_head_of_another_dtype_than_all_that_trains_beside_it_is_refused(config):
    half = ["--model=rotopo.reward.RewardModule", "--model.backbone={dtype: bfloat16}", *COMMON]
    with pytest.raises(RuntimeError, match="FSDP2 trains weights of one dtype"):
        on_ranks(2, *arguments(config, "two", [*half, *ranks("fsdp2")]))


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], SHARED], ids=["file", "folder"])
def test_a_checkpoint_of_more_than_trains_here_is_refused(config, form):
    more = [*COMMON, *LORA, "--model.policy.adapter.target_modules=[q_proj,v_proj]"]
    on_ranks(2, *arguments(config, "more", [*more, *ranks("fsdp2"), *form]))
    resume = f"--ckpt_path={last_checkpoint(config.parent / 'more')}"
    with pytest.raises(RuntimeError, match="target_modules is"):
        on_ranks(2, *arguments(config, "less", [*COMMON, *LORA, *ranks("fsdp2"), resume]))


@pytest.mark.slow
def test_so_do_they_with_all_weights_offloaded(config, single):
    """To where they are anyway, on processors: by the same way as from a GPU."""
    offload = "--trainer.strategy.cpu_offload=true"
    on_ranks(2, *arguments(config, "two", [*COMMON, *ROTATION, *ranks("fsdp2"), offload]))
    assert_same_run(single([*COMMON, *ROTATION]), config.parent / "two")


@pytest.mark.slow
@pytest.mark.parametrize("what", [LORA, ["--model=SimPO", *FULL]], ids=["DPO", "SimPO of all"])
def test_evaluation_and_generation_are_those_of_one_process(config, what):
    """An odd number of prompts, of pairs to test, and of responses to score, in uneven batches."""
    run(arguments(config, "one", [*COMMON, *what]))
    resume = [*SPLITS, *what, f"--ckpt_path={last_checkpoint(config.parent / 'one')}"]
    shown = [*resume, "--trainer.callbacks+=Generations", "--trainer.callbacks.prompts=3"]
    run(arguments(config, "validate_one", shown, "validate"))
    on_ranks(2, *arguments(config, "validate_two", [*shown, *ranks("fsdp2")], "validate"))
    generations = [f.read_text() for f in sorted(config.parent.rglob("generations.jsonl"))]
    assert generations[0] == generations[1]
    assert len(generations[0].splitlines()) == 3
    for command in ("test", "predict"):
        run(arguments(config, f"{command}_one", resume, command))
        on_ranks(2, *arguments(config, f"{command}_two", [*resume, *ranks("fsdp2")], command))
    found = [json.loads(f.read_text()) for f in sorted(config.parent.rglob("test.json"))]
    assert len(found) == 2
    assert found[0]["pairs"] == 11
    one, two = map(flat, found)
    assert one["yardstick/kl_per_token/on_data/reverse"] > 0
    assert two == pytest.approx(one, abs=1e-5)
    responses = [f.read_text() for f in sorted(config.parent.rglob("responses.jsonl"))]
    assert responses[0] == responses[1]
    assert len(responses[0].splitlines()) == 11

    (file, _) = sorted(config.parent.rglob("responses.jsonl"))
    score = [*resume, f"--data.score={file}"]
    run(arguments(config, "score_one", score, "predict"))
    on_ranks(2, *arguments(config, "score_two", [*score, *ranks("fsdp2")], "predict"))
    scores = [
        [json.loads(line) for line in f.read_text().splitlines()]
        for f in sorted(config.parent.rglob("scores.jsonl"))
    ]
    for one, two in zip(*scores, strict=True):
        assert one.pop("score") == pytest.approx(two.pop("score"), abs=1e-5)
        assert one == two


GOES_ON = [
    ("fsdp2", "fsdp2", [], FULL),
    ("ddp", "fsdp2", [], ROTATION),
    ("fsdp2", "one", SHARED, ROTATION),
    ("fsdp2", "three", SHARED, ROTATION),
    ("fsdp2", "ddp", [], HALF),
    ("fsdp2", "fsdp2", SHARED, HALF),
    ("fsdp2", "one", [], RANDOM),
    ("one", "fsdp2", [], RANDOM),
    ("fsdp2", "ddp", SHARED, PISSA),
    ("fsdp", "one", [], ROTATION),
    ("one", "fsdp", [], ROTATION),
]


def name_of(before: str, after: str, form: list[str], options: list[str]) -> str:
    what = "rotation" if options == ROTATION else "full fine-tuning"
    what += " in bfloat16" * (options == HALF)
    what = {tuple(PISSA): "a moved base", tuple(RANDOM): "a random start"}.get(tuple(options), what)
    return f"{what}: {before}{' in a folder' * bool(form)}, then {after}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "form", "options"),
    [pytest.param(*case, id=name_of(*case)) for case in GOES_ON],
)
def test_a_run_goes_on_elsewhere(config, single, before, after, form, options):
    """From the middle of an epoch, on other ranks, under another strategy: the same end."""

    alone = [*COMMON, *options, *(ALONE if options == HALF else [])]

    def start(where: str, root: str, *more: str) -> None:
        given = [*COMMON, *options, *more]
        if where == "one":
            run(arguments(config, root, [*alone, *more]))
        elif where == "three":
            on_ranks(3, *arguments(config, root, [*given, *ranks("fsdp2"), *form]))
        else:
            form_of = form if where == "fsdp2" else []
            on_ranks(2, *arguments(config, root, [*given, *ranks(where), *form_of]))

    start(before, "before")
    (checkpoint,) = (config.parent / "before").rglob("*step=4.ckpt")
    assert checkpoint.is_dir() == bool(form)
    # Another start of the adapter, for one, were it not the checkpoint's.
    start(after, "after", f"--ckpt_path={checkpoint}", "--seed_everything=2")
    expected, found = trained(single(alone)), trained(config.parent / "after")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], SHARED], ids=["file", "folder"])
def test_what_ranks_have_trained_is_exported_and_loaded_without_rotopo(config, tmp_path, form):
    """Merged, in plain transformers: the logits of the single process's model."""
    far = [*COMMON, *ROTATION, "--model.policy.adapter.target_modules=all-linear"]
    run(arguments(config, "one", far))
    on_ranks(2, *arguments(config, "two", [*far, *ranks("fsdp2"), *form]))
    for name in ("one", "two"):
        folder = tmp_path / name / "version_0"
        export(run=folder, output=tmp_path / f"{name}_model")
        export(run=folder, output=tmp_path / f"{name}_adapter", form="adapter")
    ids = torch.arange(5, 45)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one_model")(input_ids=ids).logits
    assert (base(input_ids=ids).logits - expected).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "two_model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "two_adapter")
    for model in (merged, adapted):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
