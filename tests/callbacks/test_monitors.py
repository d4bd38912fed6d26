"""Monitors of callbacks and of the scheduler: refused by name, and schedulers that follow one."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rotopo.callbacks.monitors import flatten, follows_metric
from rotopo.export.command import export
from rotopo.objectives import DPO
from tests.small_run import save_config
from tests.test_training import assert_equal, fit, weights

PLATEAU = [
    "--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
    "--model.scheduler.monitor={}",
    "--model.scheduler.patience=0",
    "--model.scheduler.factor=0.5",
    "--model.scheduler.threshold=10",  # so that nothing counts as better than the first value
    "--model.scheduler.threshold_mode=abs",
]
EVERY_STEP = [
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.filename=step{step}",
]


def plateau(monitor: str) -> list[str]:
    return [option.format(monitor) for option in PLATEAU]


def early(monitor: str, **settings) -> list[str]:
    options = ["--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.monitor={monitor}"]
    return options + [f"--trainer.callbacks.{k}={v}" for k, v in settings.items()]


def saving(monitor: str) -> list[str]:
    return ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.monitor={monitor}"]


class LogsItsOwn(DPO):
    """A module of a user's, with metrics of its own."""

    def training_step(self, batch, batch_idx):
        self.log("train/mine", 1.0)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val/mine", 1.0)


class Rates(Callback):
    """The learning rate of each step, and how often the run has validated by then."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_train_batch_start(self, trainer, *_) -> None:
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture
def rates(monkeypatch) -> Rates:
    found = Rates()
    original = DPO.configure_callbacks
    monkeypatch.setattr(DPO, "configure_callbacks", lambda self: [*original(self), found])
    return found


@pytest.mark.parametrize("sanity", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "place"),
    [
        (early("val/los"), "trainer.callbacks (EarlyStopping).monitor is 'val/los'"),
        (saving("train/los"), "trainer.callbacks (ModelCheckpoint).monitor is 'train/los'"),
        (plateau("val/los"), "model.scheduler.monitor is 'val/los'"),
    ],
)
def test_a_monitor_that_no_metric_has_is_refused(message, config, options, place, sanity):
    error = message(*options, f"--trainer.num_sanity_val_steps={sanity}").splitlines()[-1]
    assert place in error
    name = place.split("'")[1]
    assert f"Did you mean '{name}s'?" in error
    for other in ("train/rewards/margin", "val/rewards/accuracy", "val/displacement/chosen_up"):
        assert other in error
    assert not list((config.parent / "runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([*early("val/loss"), "--data.validation=0"], "does not validate: set data.validation"),
        ([*saving("val/loss"), "--trainer.limit_val_batches=0"], "trainer.limit_val_batches"),
        ([*plateau("val/loss"), "--data.validation=0"], "does not validate"),
        (early("test/loss"), "take 'val/loss'"),
        (early("lr-SGD"), "lr-SGD"),
        (early("noise/auroc"), "noise/auroc"),
    ],
)
def test_so_is_one_that_this_run_will_not_have(message, options, expected):
    assert expected in message(*options).splitlines()[-1]


@pytest.mark.parametrize("monitor", ["val/rewards/accuracy", "train/logps/chosen"])
@pytest.mark.parametrize("sanity", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_there_is_passes(config, monitor, sanity):
    options = [*early(monitor), *saving(monitor), f"--trainer.num_sanity_val_steps={sanity}"]
    assert fit(config, "run", *options, "--trainer.max_epochs=1").trainer.global_step == 3


def test_who_is_not_strict_goes_on(config):
    assert fit(config, "run", *early("val/los", strict="false")).trainer.global_step == 6


@pytest.mark.parametrize("monitor", ["train/mine", "val/mine"])
def test_metrics_of_a_users_own_are_not_refused(config, monitor):
    options = ["--model=tests.callbacks.test_monitors.LogsItsOwn", *early(monitor, patience=9)]
    assert fit(config, "run", *options, *saving(monitor)).trainer.global_step == 6


@pytest.mark.parametrize("options", [early("val/yours"), saving("val/yours"), plateau("val/yours")])
def test_and_where_one_is_missing_that_is_still_one_line(message, options):
    error = message("--model=tests.callbacks.test_monitors.LogsItsOwn", *options)
    assert "val/yours" in error.splitlines()[-1]
    assert "val/mine" in error.splitlines()[-1]


def test_what_callbacks_say_that_they_log_is_what_they_log(config):
    from rotopo.callbacks import Speed

    cli = fit(config, "run", "--trainer.max_epochs=1")
    logged = {name for name in cli.trainer.callback_metrics if name.startswith("speed/")}
    assert logged <= set(Speed.metric_names)
    assert set(Speed.metric_names) - logged <= {"speed/mfu", "speed/memory_gib"}  # of some machines
    pairs = {name.partition("/")[2] for name in cli.trainer.callback_metrics} - logged
    for stage in ("train", "val"):
        own = {n.partition("/")[2] for n in cli.trainer.callback_metrics if n.startswith(stage)}
        assert own <= pairs
        assert "displacement/chosen_up" in own


def test_a_scheduler_follows_a_metric_where_its_step_takes_one():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert follows_metric(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    assert not follows_metric(torch.optim.lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        # Steps of an epoch: 3. The rate halves with each validation after the first.
        ([], [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (["--trainer.val_check_interval=1"], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (["--trainer.check_val_every_n_epoch=2"], [0, 0, 0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_the_rate_falls_after_validations_and_at_no_other_time(config, rates, options, validations):
    fit(config, "run", *plateau("val/loss"), "--trainer.max_epochs=3", *options)
    expected = [0.01 * 0.5 ** max(0, n - 1) for n in validations]
    assert list(rates.rates.values()) == pytest.approx(expected)


def test_without_validation_it_follows_the_epochs(config, rates):
    fit(config, "run", *plateau("train/loss"), "--trainer.max_epochs=3", "--data.validation=0")
    assert list(rates.rates.values()) == pytest.approx([0.01] * 8 + [0.005] * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=1"],
        [],
        ["--trainer.check_val_every_n_epoch=2"],
    ],
)
def test_a_resumed_run_has_the_rates_of_one_that_was_not_killed(config, rates, options):
    """From each step's checkpoint, written before the validation, and from one after it."""
    after = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=after{step}"]
    options = [*plateau("val/loss"), "--trainer.max_epochs=3", *options]
    saved = [*after, "--trainer.callbacks.save_top_k=-1", *EVERY_STEP]
    whole = fit(config, "whole", *options, *saved)
    expected = dict(rates.rates)
    files = sorted((config.parent / "whole").rglob("*.ckpt"))
    assert len(files) > 9
    for file in files if not options[-1].startswith("--trainer.val") else files[4::5]:
        rates.rates.clear()
        resumed = fit(config, "resumed", *options, f"--ckpt_path={file}")
        assert resumed.trainer.global_step == 9
        assert rates.rates == {step: expected[step] for step in rates.rates}, file
        assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)


def test_torchs_own_has_no_monitor_and_says_what_to_write(message):
    error = message("--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau").splitlines()[-1]
    assert "lightning.pytorch.cli.ReduceLROnPlateau, with init_args: {monitor: val/loss}" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["OneCycleLR", "max_lr=0.1", "total_steps=2"], "Tried to step 3 times"),
        (["StepLR", "step_size=0"], "model.scheduler"),
        (["CyclicLR", "base_lr=0.1", "max_lr=0.2", "step_size_up=x"], "step_size_up"),
    ],
)
def test_what_a_scheduler_refuses_is_one_line(message, options, expected):
    name, *settings = options
    error = message(
        f"--model.scheduler=torch.optim.lr_scheduler.{name}",
        *(f"--model.scheduler.{setting}" for setting in settings),
    )
    assert expected in error.splitlines()[-1]


def test_schedulers_with_total_steps_get_the_runs(config, rates):
    fit(config, "run", "--model.scheduler=OneCycleLR", "--model.scheduler.max_lr=0.1")
    expected = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01), 0.1, total_steps=6
    )
    for rate in rates.rates.values():
        assert rate == pytest.approx(expected.get_last_lr()[0])
        expected.optimizer.step()
        if rate != list(rates.rates.values())[-1]:
            expected.step()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["scheduler.warmup=100"], "model.scheduler.warmup is 100.0: it is a share"),
        (["optimizer=transformers.Adafactor"], "model.optimizer (Adafactor) has no lr"),
        (
            ["scheduler=torch.optim.lr_scheduler.LambdaLR", "scheduler.lr_lambda=math.sqrt"],
            "model.scheduler, which checkpoints hold",
        ),
    ],
)
def test_schedules_that_would_fail_later_are_refused(message, options, expected):
    error = message(*(f"--model.{option}" for option in options))
    assert expected in error.splitlines()[-1]


def test_a_run_without_an_end_gives_no_number_of_steps(message):
    assert "set model.scheduler.total_steps" in message("--trainer.max_epochs=-1")


@pytest.mark.parametrize(
    ("template", "flat"),
    [
        ("{val/loss:.2f}", "val_loss={val/loss:.2f}"),
        ("best-{epoch:02d}-{val/loss}", "best-epoch={epoch:02d}-val_loss={val/loss}"),
        ("{epoch}", "{epoch}"),
        (None, None),
    ],
)
def test_names_of_checkpoints_are_flat(template, flat):
    checkpoint = ModelCheckpoint("/folder", filename=template)
    flatten(checkpoint)
    metrics = {"val/loss": torch.tensor(0.692), "epoch": torch.tensor(3)}
    assert checkpoint.filename == flat
    name = checkpoint.format_checkpoint_name(metrics)
    assert Path(name).parent == Path("/folder")


@pytest.mark.parametrize("name", ["{val/loss:.3f}", "best/{step}"])
def test_a_checkpoint_named_by_a_metric_is_found(config, tmp_path, capsys, name):
    options = [*saving("val/loss"), f"--trainer.callbacks.filename={name}"]
    cli = fit(config, "run", *options)
    best = Path(cli.trainer.checkpoint_callback.best_model_path)
    assert best.is_file()
    export(Path(cli.trainer.log_dir), tmp_path / "out", form="adapter", prompts=1)
    assert f"export: {best}, the best by val/loss" in capsys.readouterr().out
