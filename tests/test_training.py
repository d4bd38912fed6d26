"""Steps, checkpoints and resumption, through the command line."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from rotopo.cli import run
from rotopo.errors import InputError
from rotopo.objectives import DPO
from rotopo.training import Warmup
from tests.small_run import save_config, save_model

CHECKPOINTS = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=-1",
]

# Where two runs ought to differ by rounding only.
EXACT = ["--model.policy.dtype=float64", "--model.policy.adapter.lora_dropout=0"]


class Killed(BaseException):
    pass


class Kill(Callback):
    """Dies at a batch: before its step, or after it and before the checkpoint."""

    def __init__(self, batch: int, before: bool) -> None:
        self.batch = batch
        self.before = before
        self.seen = 0

    def on_train_batch_start(self, *_) -> None:
        if self.before and self.seen == self.batch:
            raise Killed

    def on_train_batch_end(self, *_) -> None:
        self.seen += 1
        if not self.before and self.seen > self.batch:
            raise Killed


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def fit(config: Path, root: str, *options: str):
    arguments = ["fit", "--config", str(config), "--trainer.default_root_dir"]
    return run([*arguments, str(config.parent / root), *options])


def last_checkpoint(folder: Path) -> Path | None:
    return max(folder.rglob("last*.ckpt"), key=lambda f: f.stat().st_mtime, default=None)


def weights(cli) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in cli.model.named_parameters() if p.requires_grad}


def assert_equal(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.mark.parametrize(
    ("layout", "batches"),
    [("padded", (1, 3)), pytest.param("packed", (1, 2, 3, 6), marks=pytest.mark.slow)],
)
def test_accumulation_changes_no_number(config, layout, batches):
    options = [*EXACT, f"--data.layout={layout}", "--trainer.max_epochs=1"]
    runs = [
        fit(config, f"a{n}", *options, f"--trainer.accumulate_grad_batches={n}") for n in batches
    ]
    logs = [pd.read_csv(Path(one.trainer.log_dir) / "metrics.csv") for one in runs]
    for one, log in zip(runs[1:], logs[1:], strict=True):
        assert one.trainer.global_step == runs[0].trainer.global_step == 3
        assert_equal(weights(one), weights(runs[0]), rtol=1e-7, atol=1e-9)
        columns = [c for c in logs[0] if c.startswith(("train/", "val/"))]
        pd.testing.assert_frame_equal(log[columns], logs[0][columns], rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "before", "workers"),
    [
        (3, False, 0),
        *(
            pytest.param(*k, marks=pytest.mark.slow)
            for k in [(7, True, 2), (1, True, 0), (9, False, 2)]
        ),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(config, monkeypatch, workers, batch, before):
    """Two micro-batches a step, three steps an epoch, two epochs: kills in the midst of both."""
    options = [*CHECKPOINTS, "--trainer.accumulate_grad_batches=2"]
    options += [f"--data.num_workers={workers}"]
    whole = fit(config, "whole", *options)
    assert whole.trainer.global_step == 6
    kill = Kill(batch, before)
    original = DPO.configure_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(DPO, "configure_callbacks", lambda self: [*original(self), kill])
        with pytest.raises(Killed):
            fit(config, "killed", *options)
    last = last_checkpoint(config.parent / "killed")
    resumed = fit(config, "killed", *options, *([f"--ckpt_path={last}"] if last else []))
    assert resumed.trainer.global_step == 6
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    "kills",
    [pytest.param(k, marks=pytest.mark.slow) for k in [(6, 2), (3, 5), (2, 3), (4, 2), (3, 3)]],
)
def test_so_does_one_that_is_killed_twice(config, monkeypatch, kills):
    """Three steps an epoch, a checkpoint each: at the end of an epoch, and in its midst."""
    options = [*CHECKPOINTS, "--trainer.max_epochs=3"]
    whole = fit(config, "whole", *options)
    original = DPO.configure_callbacks
    resume: list[str] = []
    for batch in kills:
        kill = Kill(batch, before=True)
        with monkeypatch.context() as patch:
            patch.setattr(DPO, "configure_callbacks", lambda self, k=kill: [*original(self), k])
            with pytest.raises(Killed):
                fit(config, "killed", *options, *resume)
        resume = [f"--ckpt_path={last_checkpoint(config.parent / 'killed')}"]
    resumed = fit(config, "killed", *options, *resume)
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


def test_checkpoints_hold_the_adapter_and_not_the_base(config):
    cli = fit(config, "run", *CHECKPOINTS)
    (file, *_) = (config.parent / "run").rglob("last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(weights(cli))
    assert all("lora_" in name for name in checkpoint["state_dict"])
    trained = sum(w.numel() * 4 for w in weights(cli).values())
    whole = (config.parent / "model" / "model.safetensors").stat().st_size
    assert file.stat().st_size < 5 * trained + 60_000 < whole


def test_a_checkpoint_of_another_base_or_adapter_is_refused(config, tiny_tokenizer, capsys):
    fit(config, "run", *CHECKPOINTS)
    (file, *_) = (config.parent / "run").rglob("last.ckpt")
    resume = f"--ckpt_path={file}"
    with pytest.raises(SystemExit):
        fit(config, "other", resume, "--model.policy.adapter.target_modules=[v_proj]")
    assert "target_modules is ['v_proj'] here and ['q_proj']" in capsys.readouterr().err
    other = save_model(config.parent / "other_model", tiny_tokenizer, seed=1)
    with pytest.raises(SystemExit):
        fit(config, "other", resume, f"--model.policy.path={other}")
    assert f"policy.path is {other}, which is another base model" in capsys.readouterr().err


def test_resuming_at_a_position_that_means_something_else_is_refused(config, capsys):
    fit(config, "run", *CHECKPOINTS, "--data.validation=0", "--data.test=0")
    resume = f"--ckpt_path={last_checkpoint(config.parent / 'run')}"
    for option in ("--data.pairs_per_step=3", "--data.seed=5", "--data.train_pairs=12"):
        with pytest.raises(SystemExit):
            fit(config, "other", resume, "--data.validation=0", "--data.test=0", option)
        name, _, value = option.removeprefix("--").partition("=")
        assert f"{name} is {value} here and " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (3, 2, 1),
        *(pytest.param(*k, marks=pytest.mark.slow) for k in [(1, 3, 3), (2, 1, 5), (3, 2, 5)]),
    ],
)
def test_a_run_resumes_with_steps_cut_up_in_another_way(config, before, after, step):
    """Three steps an epoch, two epochs: in the midst of both, and between them."""
    cut = "--trainer.accumulate_grad_batches={}".format
    options = [*EXACT, *CHECKPOINTS, "--trainer.val_check_interval=1.0"]
    whole = fit(config, "whole", *options, cut(before))
    (file,) = (config.parent / "whole").rglob(f"*step={step}.ckpt")
    resumed = fit(config, "resumed", *options, cut(after), f"--ckpt_path={file}")
    assert resumed.trainer.global_step == whole.trainer.global_step == 6
    assert_equal(weights(resumed), weights(whole), rtol=1e-7, atol=1e-9)


def test_warmup_rises_and_decays():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = Warmup(optimizer, warmup=0.2, decay="cosine", total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2 / 3)
    assert rates[2] == 2.0 == max(rates)
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)
    assert rates[6] == pytest.approx(1.0)
    with pytest.raises(InputError, match="total_steps"):
        Warmup(optimizer)
    with pytest.raises(InputError, match="floor is 2"):
        Warmup(optimizer, total_steps=10, floor=2)


def test_a_decay_to_a_floor_is_transformers():
    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = make(optimizer)
        found = []
        for _ in range(12):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    ours = rates(lambda o: Warmup(o, warmup=0.0, total_steps=10, floor=0.1))
    theirs = get_cosine_with_min_lr_schedule_with_warmup
    expected = rates(lambda o: theirs(o, 0, 10, min_lr_rate=0.1))
    assert ours[:11] == pytest.approx(expected[:11])
    assert ours[11] == pytest.approx(0.2)


def test_the_schedule_is_stepped_per_optimiser_step(config):
    cli = fit(config, "run", "--trainer.accumulate_grad_batches=2")
    (scheduler,) = (c.scheduler for c in cli.trainer.lr_scheduler_configs)
    assert scheduler.last_epoch == cli.trainer.global_step == 6
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
