"""Short fits, one of each kind, whose every number is to stay what it is.

The model is a tiny OPT: of transformers' families one of the few that compute in float64 all the
way, so that processors differ near 1e-15 only. Its weights and its data come from Python's own
generator, which is the same everywhere, and what torch draws to start from is rounded coarsely; it
has no biases, since that of the keys has a gradient that is zero up to rounding, of which Adam
makes noise. Each run is a list of command lines.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from rotopo.cli import run
from tests.byte_tokenizer import save_tiny_tokenizer
from tests.ranks import on_ranks, strategy
from tests.small_run import save_pairs

INPUTS = "inputs"  # the folder of what all runs share
WEIGHTS = "weights.safetensors"
_GRID = 64
_CHECKPOINTS = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=-1",
]
_COARSE = ["--trainer.callbacks+=tests.golden.runs.CoarseStart"]
_ROTATION = ["--model.policy.adapter=rotopo.rotation.RotationConfig"]
_GEOMETRY = ["--trainer.callbacks+=rotopo.callbacks.Geometry"]
_PERPLEXITY = [
    "--trainer.callbacks+=rotopo.callbacks.Perplexity",
    f"--trainer.callbacks.file={INPUTS}/text.txt",
    "--trainer.callbacks.window=64",
]
_RATES = ["--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"]
_FULL = ["--model.policy={adapter: null}"]
_REWARD = [
    "--model=rotopo.reward.RewardModule",
    f"--model.backbone={{path: {INPUTS}/model, dtype: float64, compile: false}}",
    "--model.backbone.adapter={class_path: peft.LoraConfig, init_args: {r: 4}}",
    "--model.centering=0.1",
    "--model.l2=0.01",
    "--model.margin=0.2",
]
_MICRO_BATCHES = ["--trainer.accumulate_grad_batches=2"]
_NOISE = ["--data.noise=rotopo.data.noise.SymmetricFlips", "--data.noise.rate=0.3"]
_ROUNDS = [
    "--trainer.callbacks+=rotopo.robust.Alternation",
    "--trainer.callbacks.rho=0.3",
    "--trainer.callbacks.resampling={samples: 3, max_new_tokens: 4, quantile: 0.9}",
    "--trainer.max_epochs=2",
]
# Nine pairs to validate on and eleven to test: uneven on two ranks.
_UNEVEN = ["--data.validation=0.225", "--data.test=0.275", "--data.eval_pairs_per_batch=2"]


class CoarseStart(Callback):
    """Rounds what trains to multiples of 1/64 before the first step.

    Adapters and heads start from random numbers in float32, whose last bit depends on the
    processor's instructions. One that starts as the identity still does.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    if parameter.requires_grad:
                        parameter.copy_((parameter * _GRID).round() / _GRID)


@dataclass(frozen=True)
class Golden:
    """A run: a fit, and what is done with it.

    Attributes:
        options: of the fit, beyond those that all have.
        after: commands that follow, on the fit's last checkpoint, with the options of each.
        ranks: processes.
        resume_from: the step from whose checkpoint a second fit goes on; None for one fit only.
    """

    options: list[str]
    after: tuple[tuple[str, list[str]], ...] = ()
    ranks: int = 1
    resume_from: int | None = None


RUNS = {
    "rotation": Golden(
        [*_ROTATION, *_GEOMETRY, *_MICRO_BATCHES],
        after=(("test", []), ("predict", []), ("doctor", [])),
    ),
    "lora": Golden(
        ["--trainer.gradient_clip_val=0.5", "--data.layout=padded", *_PERPLEXITY],
        after=(("test", []),),
    ),
    "full": Golden([*_FULL, *_RATES, "--data.layout=shared_prompt", "--data.length_window=2"]),
    "reward": Golden(
        _REWARD, after=(("test", []), ("predict", [f"--data.score={INPUTS}/responses.jsonl"]))
    ),
    "kto": Golden(["--model=KTO", *_MICRO_BATCHES]),
    "typo": Golden(["--model=TYPO", "--model.sample_tokens=6", *_ROTATION]),
    "bco": Golden(["--model=BCO", "--model.beta=0.2", *_MICRO_BATCHES], after=(("test", []),)),
    "sampo": Golden(["--model=SamPO", "--model.beta=0.3", *_MICRO_BATCHES]),
    "rounds": Golden(["--model=ROPO", *_NOISE, *_ROUNDS]),
    "cached": Golden(
        ["--model.policy.reference=cached", "--model.policy.reference_cache=cached/cache/reference"]
    ),
    "ddp": Golden([*_UNEVEN, *_ROTATION, *strategy("ddp")], ranks=2),
    "fsdp2": Golden([*_UNEVEN, *_ROTATION, *strategy("fsdp2")], ranks=2),
    # The checkpoint is written just before a validation, which the second fit makes up for.
    "resumed": Golden(
        [
            *_MICRO_BATCHES,
            "--model.policy.adapter.lora_dropout=0.2",
            "--trainer.val_check_interval=4",
        ],
        resume_from=2,
    ),
}


def save_inputs(folder: Path) -> None:
    """The model, the pairs, responses to score, and the settings that all runs share."""
    folder.mkdir(parents=True)
    tokenizer = save_tiny_tokenizer(folder / "model")
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        enable_bias=False,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    generator = random.Random(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:  # large enough that all parts of it move the log-probs
                numbers = [generator.randint(-16, 16) / _GRID for _ in range(parameter.numel())]
                parameter.copy_(torch.tensor(numbers).view_as(parameter))
    model.save_pretrained(folder / "model")
    save_pairs(folder / "pairs.jsonl")
    lines = [f'{{"prompt": "{i}: a film", "response": "{"no wit " * i}"}}\n' for i in range(1, 5)]
    (folder / "responses.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "text.txt").write_text("A film of some wit, and of no heart. " * 8, "utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(_shared(), sort_keys=False), "utf-8")


def _shared() -> dict:
    """Four steps of five pairs. All paths are relative to the folder of all runs."""
    return {
        "seed_everything": 1,
        "model": {
            "class_path": "rotopo.objectives.DPO",
            "init_args": {
                "beta": 0.3,
                "policy": {
                    "path": f"{INPUTS}/model",
                    "dtype": "float64",
                    "compile": False,
                    "adapter": {
                        "class_path": "peft.LoraConfig",
                        "init_args": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                    },
                },
                # Of an eps that no gradient near rounding is blown up to a step by.
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 0.01, "eps": 1e-4},
                },
                "scheduler": {"class_path": "rotopo.training.Warmup"},
                "sampling": {"max_new_tokens": 4},
            },
        },
        "data": {
            "class_path": "rotopo.data.module.PairwiseDataModule",
            "init_args": {
                "source": f"{INPUTS}/pairs.jsonl",
                "validation": 0.2,
                "test": 0.3,
                "pairs_per_step": 5,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }


def carry_out(name: str, folder: Path) -> float:
    """One run with all its commands, on one thread; returns the seconds that it took.

    It leaves in ``folder/NAME`` a folder for each command: ``fit``, ``resumed``, ``test``,
    ``predict``, ``doctor``, each with what one process printed beside what the command writes, and
    ``weights.safetensors``, all that the last checkpoint holds of the module.

    Args:
        name: of :data:`RUNS`.
        folder: of all runs, with :func:`save_inputs` in its folder ``inputs``.
    """
    golden, start = RUNS[name], time.monotonic()
    with _inside(folder), _one_thread():
        _command(golden, name, "fit", "fit", golden.options)
        if golden.resume_from is not None:
            (checkpoint,) = Path(name, "fit").rglob(f"*step={golden.resume_from}.ckpt")
            _command(golden, name, "resumed", "fit", [*golden.options, f"--ckpt_path={checkpoint}"])
        for command, options in golden.after:
            resume = [] if command == "doctor" else [f"--ckpt_path={_last_checkpoint(name)}"]
            _command(golden, name, command, command, [*golden.options, *options, *resume])
        checkpoint = torch.load(_last_checkpoint(name), weights_only=True)
        save_file(checkpoint["state_dict"], Path(name, WEIGHTS))
    return time.monotonic() - start


def _last_checkpoint(name: str) -> Path:
    """The last one of a run's last fit."""
    fits = [Path(name, "resumed"), Path(name, "fit")]
    (file,) = next(fit for fit in fits if fit.exists()).rglob("last.ckpt")
    return file


def _command(golden: Golden, name: str, step: str, command: str, options: list[str]) -> None:
    own = Path(name, step)
    own.mkdir(parents=True)
    folders = [f"--trainer.default_root_dir={own}", f"--data.cache_dir={name}/cache"]
    # The options of all come first: the reward model has no policy.
    arguments = [
        command,
        f"--config={INPUTS}/config.yaml",
        *_CHECKPOINTS,
        *_COARSE,
        *options,
        *folders,
    ]
    if golden.ranks > 1:
        on_ranks(golden.ranks, *arguments)
        return
    with (
        (own / "printed.txt").open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
    ):
        run(arguments)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In the folder, so that all paths that a run writes down are relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
