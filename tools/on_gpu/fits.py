"""Whole fits through the command line: objectives, resumption, strategies, options, what follows.

Models and data are those of the tests' small runs: two layers, six optimiser steps. The losses of a
fit on the device are those of the same fit on the processor, and under a strategy those without. A
fit goes on from a checkpoint bit for bit under ``trainer.deterministic``; where torch refuses that
for an operation, which it names, to rounding.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback

from rotopo.cli import main, run
from tests.byte_tokenizer import save_tiny_tokenizer
from tests.small_run import save_config, save_model
from tools.on_gpu.journal import Case, Ended, NotHereError, WrongResultError
from tools.on_gpu.part import Place, require

ROOT = Path(__file__).parents[2]
# A loss is near ln 2; AdamW's first steps turn rounding of small gradients into whole steps.
_NEAR = 2e-3
CHECKPOINTS = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=-1",
)
LORA = ("--model.policy.adapter.lora_dropout=0",)
DROPOUT = ("--model.policy.adapter.lora_dropout=0.2",)
ROTATION = ("--model.policy.adapter=rotopo.rotation.RotationConfig",)
FULL = ("--model.policy={adapter: null, dtype: float32}", "--model.optimizer.lr=0.001")
REWARD = (
    "--model=rotopo.reward.RewardModule",
    "--model.backbone.dtype=float32",
    "--model.backbone.adapter={class_path: peft.LoraConfig, init_args: {r: 4}}",
)


@dataclass(frozen=True)
class Fit:
    """A fit that has to end.

    Attributes:
        options: of the command line.
        like: what its losses equal: those on the ``processor``, those on the device without
            ``without``, or of nothing else.
        without: the last so many options.
        needs: ``compiler``, or as :func:`tools.on_gpu.part.require` has it.
        tiny: also in the small run.
    """

    options: tuple[str, ...] = ()
    like: str = "processor"
    without: int = 0
    needs: tuple[str, ...] = ()
    tiny: bool = False


def _policy(*options: str) -> tuple[str, ...]:
    return (*LORA, *(f"--model.policy.{option}" for option in options))


OBJECTIVES = {
    "rotation": Fit(ROTATION, tiny=True),
    "LoRA": Fit(LORA, tiny=True),
    "full": Fit(FULL, tiny=True),
    "reward model": Fit(REWARD, tiny=True),
    "KTO": Fit(("--model=KTO", *LORA), tiny=True),
    # Its samples are drawn by each device's own generator.
    "TYPO": Fit(("--model=TYPO", *LORA), like="", tiny=True),
}
RESUMED = {"rotation": ROTATION, "LoRA with dropout": DROPOUT, "full": FULL}
# The name of a strategy stands for its file in configs/strategies.
STRATEGIES = {
    "DDP": Fit((*ROTATION, "ddp")),
    "FSDP1": Fit((*LORA, "fsdp"), needs=("GPU",)),
    "FSDP2": Fit((*ROTATION, "fsdp2"), tiny=True),
    "FSDP2, offloaded": Fit((*LORA, "fsdp2", "--trainer.strategy.cpu_offload=true")),
    "FSDP2, checkpoint folders": Fit(
        (*FULL, "fsdp2", "--trainer.strategy.save_distributed_checkpoint=true")
    ),
}
OPTIONS = {
    "activation checkpointing": Fit(_policy("activation_checkpointing=true")),
    "cached reference": Fit(_policy("reference=cached")),
    "padded": Fit((*LORA, "--data.layout=padded")),
    "bfloat16": Fit(_policy("dtype=bfloat16"), like=""),
    "flex_attention": Fit(
        _policy("attention=flex_attention"), like="device", without=1, needs=("GPU",)
    ),
    "compiled": Fit(_policy("compile=true"), like="device", without=1, needs=("GPU", "compiler")),
    "compiled, checkpointing": Fit(
        _policy("compile=true", "activation_checkpointing=true"),
        like="device",
        without=2,
        needs=("GPU", "compiler"),
    ),
    "full, computed in bfloat16": Fit(
        ("--model.policy={adapter: null, dtype: float32, compute_dtype: bfloat16}", *FULL[1:]),
        like="",
        needs=("policy.compute_dtype",),
    ),
    "4-bit rotation": Fit(
        (*ROTATION, "--model.policy.quantize=4bit"), like="", needs=("GPU", "bitsandbytes")
    ),
    "8-bit LoRA": Fit(_policy("quantize=8bit"), like="", needs=("GPU", "bitsandbytes")),
    "4-bit LoRA": Fit(_policy("quantize=4bit"), like="", needs=("GPU", "bitsandbytes")),
}


class Killed(BaseException):
    pass


class Kill(Callback):
    """Ends the process's work before its batch of this number, as if the process had died."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Killed


@dataclass(frozen=True)
class Runs:
    """Where fits run, and the folder of their model, data and runs."""

    place: Place
    folder: Path

    def fit(self, options: tuple[str, ...], device: str | None = None, command: str = "fit") -> Any:
        """A finished run, as rotopo's command line has built it."""
        device = device or self.place.device
        root = Path(tempfile.mkdtemp(dir=self.folder))
        model = "backbone" if "--model=rotopo.reward.RewardModule" in options else "policy"
        accelerator = "gpu" if device == "cuda" else "cpu"
        try:
            return run(
                [
                    command,
                    f"--config={self.folder / 'config.yaml'}",
                    *_files(options),
                    f"--model.{model}.path={self.folder / 'model'}",
                    f"--data.cache_dir={root / 'cache'}",
                    f"--trainer.default_root_dir={root}",
                    f"--trainer.accelerator={accelerator}",
                    "--trainer.devices=1",
                ]
            )
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
                os.environ.pop(name, None)

    @functools.cache  # noqa: B019 (they live as long as the process)
    def trained(self) -> tuple[str, ...]:
        """Options that name a fit of LoRA on the device; the last is its checkpoint."""
        cli = self.fit((*LORA, *CHECKPOINTS))
        last = Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"
        return (*LORA, f"--ckpt_path={last}")

    @functools.cache  # noqa: B019
    def losses(self, options: tuple[str, ...], device: str) -> pd.DataFrame:
        return losses(self.fit(options, device))


def cases(place: Place) -> dict[str, Case]:
    folder = Path(tempfile.mkdtemp())
    tokenizer = save_tiny_tokenizer(folder / "tokenizer")
    save_config(folder, tokenizer)
    # Heads of 16 numbers, since FlexAttention's kernels take no smaller ones.
    save_model(folder / "model", tokenizer, hidden_size=64)
    runs, found = Runs(place, folder), {}
    for name, what in OBJECTIVES.items():
        found[name] = functools.partial(fitted, runs, what)
    for name, options in RESUMED.items():
        if name == "LoRA with dropout" or not place.tiny:
            found[f"resumed: {name}"] = functools.partial(resumed, runs, options)
    found |= {f"then {name}": functools.partial(then, runs, name) for name in THEN}
    for name, what in STRATEGIES.items():
        found[name] = functools.partial(divided, runs, what)
    for name, what in OPTIONS.items():
        found[name] = functools.partial(fitted, runs, what)
    every = OBJECTIVES | STRATEGIES | OPTIONS
    # What is left out of the small run; but not what a processor cannot run, which it says.
    left_out = {n for n, what in every.items() if not (what.tiny or what.needs[:1] == ("GPU",))}
    return {n: case for n, case in found.items() if not (place.tiny and n in left_out)}


def line(ended: list[Ended]) -> str:
    texts = [f"{sum(case.outcome == 'passed' for case in ended)} fits as they should be"]
    operations = {case.values["operation"] for case in ended if case.values.get("operation")}
    resumed = [case.values for case in ended if "bit_for_bit" in case.values]
    exact = sum(values["bit_for_bit"] for values in resumed)
    if resumed:
        texts.append(f"{exact} of {len(resumed)} resumed bit for bit")
    return ", ".join(texts + [f"not deterministic: {name}" for name in sorted(operations)])


def fitted(runs: Runs, what: Fit) -> dict[str, Any]:
    """A fit on the device, and how far its losses are from those that they ought to be."""
    _require(what.needs, runs.place)
    found = losses(runs.fit(what.options))
    values = {"last_loss": float(found["train/loss"].iloc[-1])}
    if what.like == "processor" and runs.place.on_gpu:
        expected = runs.losses(what.options, "cpu")
    elif what.like == "device":
        expected = runs.losses(what.options[: -what.without], runs.place.device)
    else:
        return values
    return values | _near(found, expected)


def divided(runs: Runs, what: Fit) -> dict[str, Any]:
    """Under a strategy, from the beginning and from a checkpoint in its midst."""
    _require(what.needs, runs.place)
    plain = tuple(o for o in what.options if o.startswith("--model"))
    whole = runs.fit((*what.options, *CHECKPOINTS))
    (middle,) = Path(whole.trainer.log_dir).rglob("*step=3.ckpt")
    found, expected = losses(whole), runs.losses(plain, runs.place.device)
    values = _near(found, expected)
    rest = losses(runs.fit((*what.options, *CHECKPOINTS, f"--ckpt_path={middle}")))
    return values | {"resumed": _near(rest, found)["loss_difference"]}


def resumed(runs: Runs, options: tuple[str, ...]) -> dict[str, Any]:
    """Killed before its fifth step and resumed, against never having been killed."""
    operation = ""
    for deterministic in ("true", "false"):
        every = (*options, *CHECKPOINTS, f"--trainer.deterministic={deterministic}")
        try:
            whole = runs.fit(every)
        except (Exception, SystemExit) as error:
            operation = _not_deterministic(error)
            if deterministic == "false" or not operation:
                raise
            continue
        before = set(runs.folder.rglob("last.ckpt"))
        with contextlib.suppress(Killed):
            runs.fit(
                (
                    *every,
                    "--trainer.callbacks+=tools.on_gpu.fits.Kill",
                    "--trainer.callbacks.batch=4",
                )
            )
        (last,) = set(runs.folder.rglob("last.ckpt")) - before
        again = runs.fit((*every, f"--ckpt_path={last}"))
        largest = max(
            float((a - b).abs().max())
            for a, b in zip(_trained(whole), _trained(again), strict=True)
        )
        values = {"bit_for_bit": largest == 0, "weights": largest, "operation": operation}
        if (deterministic == "true" and largest > 0) or largest > _NEAR:
            raise WrongResultError(
                f"weights differ by {largest:.1e} from those never killed", values
            )
        return values
    raise AssertionError  # the second round returns or raises


def _test(runs: Runs, trained: tuple[str, ...]) -> dict[str, Any]:
    runs.fit(trained, command="test")
    return {}


def _predict(runs: Runs, trained: tuple[str, ...]) -> dict[str, Any]:
    cli = runs.fit(trained, command="predict")
    return {"responses": _lines(Path(cli.trainer.log_dir).parent, "responses.jsonl")}


def _score(runs: Runs, trained: tuple[str, ...]) -> dict[str, Any]:
    pair = json.loads((runs.folder / "pairs.jsonl").read_text("utf-8").splitlines()[0])
    responses = runs.folder / "responses.jsonl"
    row = {"prompt": pair["prompt"], "response": pair["chosen"]}
    responses.write_text(json.dumps(row) + "\n", encoding="utf-8")
    cli = runs.fit((*trained, f"--data.score={responses}"), command="predict")
    return {"scores": _lines(Path(cli.trainer.log_dir).parent, "scores.jsonl")}


def _export(runs: Runs, trained: tuple[str, ...]) -> dict[str, Any]:
    run_folder = Path(trained[-1].partition("=")[2]).parents[1]
    output = runs.folder / "exported"
    main(["export", f"--run={run_folder}", f"--output={output}"])
    return {"files": sorted(file.name for file in output.iterdir())}


THEN = {"test": _test, "predict": _predict, "score": _score, "export": _export}


def then(runs: Runs, name: str) -> dict[str, Any]:
    """A command on what a fit on the device has left."""
    return THEN[name](runs, runs.trained())


def _lines(folder: Path, name: str) -> int:
    (file,) = folder.rglob(name)
    return len(file.read_text("utf-8").splitlines())


def losses(cli: Any) -> pd.DataFrame:
    """Logged losses, by step."""
    log = pd.read_csv(Path(cli.trainer.log_dir) / "metrics.csv")
    return log.groupby("step")[["train/loss", "val/loss"]].max()


def _near(found: pd.DataFrame, expected: pd.DataFrame) -> dict[str, float]:
    """Of the steps of both."""
    steps = found.index.intersection(expected.index)
    difference = float((found.loc[steps] - expected.loc[steps]).abs().max().max())
    values = {"loss_difference": difference, "steps": len(steps)}
    if not difference <= _NEAR or not len(steps):
        raise WrongResultError(f"losses differ by {difference:.1e}", values)
    return values


def _trained(cli: Any) -> list[torch.Tensor]:
    return [p.detach().cpu() for p in cli.model.parameters() if p.requires_grad]


def _files(options: tuple[str, ...]) -> list[str]:
    """Options, in which the name of a strategy stands for its file."""
    return [
        o if o.startswith("--") else f"--config={ROOT / 'configs' / 'strategies' / o}.yaml"
        for o in options
    ]


def _not_deterministic(error: BaseException | None) -> str:
    """The operation that torch refuses to make deterministic, by name; else nothing."""
    while error is not None:
        if "does not have a deterministic implementation" in str(error):
            return str(error).partition(" does not have")[0].split()[-1]
        error = error.__cause__ or error.__context__
    return ""


def _require(needs: tuple[str, ...], place: Place) -> None:
    """Refuse what the machine lacks, see :func:`tools.on_gpu.part.require`."""
    for need in needs:
        if need != "compiler":
            require(need, place)
        elif not (shutil.which("g++") or shutil.which("clang++")):
            raise NotHereError("no C++ compiler")
