"""Every setting has a class, and each that is said to count from the next step on does."""

import functools
import inspect
import math
import operator
import typing
from types import SimpleNamespace

import lightning.pytorch.callbacks
import lightning.pytorch.cli
import peft
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import DDPStrategy

import rotopo.callbacks
import rotopo.objectives
import rotopo.reward
import rotopo.robust
from rotopo.data.module import PairwiseDataModule
from rotopo.data.noise import LabelNoise
from rotopo.errors import InputError
from rotopo.lightning_cli import RotopoTrainer
from rotopo.objectives import DPO, IPO, Mixture
from rotopo.optimisers import Warmup, configured
from rotopo.rotation import RotationConfig
from rotopo.run.changed import TABLE, row_of
from rotopo.run.rates import Rates
from rotopo.strategies import FSDP1Strategy, FSDP2Strategy

OBJECTIVES = [getattr(rotopo.objectives, name) for name in rotopo.objectives.__all__]
MODULES = [*OBJECTIVES, rotopo.reward.RewardModule]
OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and kind is not torch.optim.Optimizer
]
SCHEDULERS = [
    Warmup,
    lightning.pytorch.cli.ReduceLROnPlateau,
    *(
        getattr(torch.optim.lr_scheduler, name)
        for name in torch.optim.lr_scheduler.__all__
        if name not in ("LRScheduler", "ReduceLROnPlateau")
    ),
]
ADAPTERS = [RotationConfig, peft.LoraConfig, peft.OFTConfig, peft.BOFTConfig, peft.HRAConfig]
CALLBACKS = [
    lightning.pytorch.callbacks.EarlyStopping,
    lightning.pytorch.callbacks.ModelCheckpoint,
    rotopo.robust.Alternation,
    *(getattr(rotopo.callbacks, name) for name in rotopo.callbacks.__all__),
]
PLACES = [
    *((kind, "model") for kind in MODULES),
    *((kind, "model.objectives.X") for kind in MODULES),
    *((kind, "model.optimizer") for kind in OPTIMIZERS),
    *((kind, "model.scheduler") for kind in SCHEDULERS),
    *((kind, "model.policy.adapter") for kind in ADAPTERS),
    *((kind, "model.backbone.adapter") for kind in ADAPTERS),
    (PairwiseDataModule, "data"),
    *((kind, "data.noise") for kind in LabelNoise.__subclasses__()),
    (RotopoTrainer, "trainer"),
    *((kind, f"trainer.callbacks.{kind.__name__}") for kind in CALLBACKS),
    *((kind, "trainer.strategy") for kind in (DDPStrategy, FSDP1Strategy, FSDP2Strategy)),
]


def settings_of(kind: type, place: str) -> set[str]:
    """The names of a class's settings, as the parser knows them."""
    parser = ArgumentParser(exit_on_error=False)
    own = place.rpartition(".")[2]
    parser.add_class_arguments(kind, own, fail_untyped=False)
    names = vars(parser.get_defaults(skip_validation=True).as_flat())
    return {place + name.removeprefix(own) for name in names if name != own} | {place}


def test_every_setting_has_a_class():
    names = {name for kind, place in PLACES for name in settings_of(kind, place)}
    names = (names | {"seed_everything"}) - {"trainer"}  # which is no class of the settings
    assert len(names) > 500
    assert not {name for name in names if row_of(name) is None}
    # Nothing is left in the table of settings that are gone.
    patterns = {pattern for row in TABLE for pattern in row.names}
    matched = {p for p in patterns if any(row_of(n) and p in row_of(n).names for n in names)}
    assert patterns == matched
    for row in TABLE:
        assert row.reason


# Each that counts from the next step on moves what it is named by, whatever Lightning restores.


def made(optimizer, scheduler=None, **total):
    """As the command line makes them of class paths, and what Lightning makes of these."""
    parameters = [("a", torch.nn.Parameter(torch.ones(2, 2)))]
    trainer = SimpleNamespace(estimated_stepping_batches=total.get("steps", 20), fit_loop=None)
    trainer.fit_loop = SimpleNamespace(_combined_loader=None)
    found, given = configured(optimizer, scheduler, iter(parameters), trainer)
    trainer.optimizers = [found["optimizer"]]
    schedules = [found["lr_scheduler"]["scheduler"]] if "lr_scheduler" in found else []
    trainer.lr_scheduler_configs = [SimpleNamespace(scheduler=one) for one in schedules]
    return trainer, given


def stepped(trainer, steps: int) -> list[float]:
    """The learning rate of each step."""
    rates = []
    for _ in range(steps):
        rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        trainer.optimizers[0].step(lambda: torch.tensor(0.0))
        for config in trainer.lr_scheduler_configs:
            config.scheduler.step(*[1.0] * follows(config.scheduler))
    return rates


def follows(scheduler) -> bool:
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def resumed(before, after, steps=7, record=True, planned=(20, 20)):
    """What a fit under other settings goes on with after some steps, and what it says.

    Args:
        record: whether the checkpoint tells the settings, as an earlier release's do not.
        planned: the Trainer's number of steps, before and after.
    """
    first, given = made(*before, steps=planned[0])
    rates = Rates()
    rates.take(given)
    stepped(first, steps)
    ours = {"optimization": rates.save(first)} if record else {}
    checkpoint = {
        "optimizer_states": [first.optimizers[0].state_dict()],
        "lr_schedulers": [c.scheduler.state_dict() for c in first.lr_scheduler_configs],
        "global_step": steps,
        "rotopo": ours,
    }
    again = Rates()
    again.load(checkpoint)
    second, given = made(*after, steps=planned[1])
    again.take(given)
    second.optimizers[0].load_state_dict(checkpoint["optimizer_states"][0])
    for config, state in zip(
        second.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=False
    ):
        config.scheduler.load_state_dict(state)
    return second, again.restore(second)


def partial(kind, **settings):
    """As jsonargparse makes a callable of a class path."""
    return functools.partial(lambda *a, **k: kind(*a, **{**settings, **k}), **settings)


def other(value):
    """Another value of an optimiser's setting."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value / 2 if value else 0.25
    return tuple(other(one) for one in value)


# What goes with a setting that cannot change alone.
WITH = {
    "nesterov": {"momentum": 0.9},
    "capturable": {"foreach": False},
    "fused": {"foreach": False},
    "etas": {},
}
# Two ways to compute a step that exclude each other, or texts.
OWN = {
    ("Adafactor", "d"): 2.0,
    ("Adagrad", "lr_decay"): 0.1,
    ("Rprop", "etas"): (0.4, 1.3),
    ("LBFGS", "line_search_fn"): "strong_wolfe",
    ("Muon", "adjust_lr_fn"): "match_rms_adamw",
    ("Muon", "ns_steps"): 4,
}


def optimizer_settings():
    for kind in OPTIMIZERS:
        parameters = inspect.signature(kind).parameters
        for name in list(parameters)[1:]:
            yield pytest.param(kind, name, id=f"{kind.__name__}-{name}")


@pytest.mark.parametrize(("kind", "name"), optimizer_settings())
def test_an_optimisers_setting_is_in_its_groups(kind, name):
    assert row_of(f"model.optimizer.{name}").fit == "applied"
    default = inspect.signature(kind).parameters[name].default
    value = OWN.get((kind.__name__, name), other(default))
    beside = WITH.get(name, {})
    beside = {k: v for k, v in beside.items() if k in inspect.signature(kind).parameters}
    trainer, _ = resumed(
        (partial(kind, **beside, **{name: default}),), (partial(kind, **beside, **{name: value}),)
    )
    found = trainer.optimizers[0].param_groups[0][name]
    assert found == value != default


# Of each schedule what a run has, and of each setting another value.
SCHEDULES = {
    Warmup: (
        {"warmup": 0.1, "decay": "cosine", "total_steps": 20},
        {"warmup": 0.6, "decay": "linear", "total_steps": 30},
    ),
    "StepLR": ({"step_size": 5, "gamma": 0.5}, {"step_size": 3, "gamma": 0.1}),
    "MultiStepLR": ({"milestones": [3, 9], "gamma": 0.5}, {"milestones": [4, 8], "gamma": 0.1}),
    "ConstantLR": ({"factor": 0.5, "total_iters": 9}, {"factor": 0.1, "total_iters": 12}),
    "LinearLR": (
        {"start_factor": 0.5, "end_factor": 1.0, "total_iters": 10},
        {"start_factor": 0.2, "end_factor": 0.7, "total_iters": 15},
    ),
    "ExponentialLR": ({"gamma": 0.9}, {"gamma": 0.5}),
    "PolynomialLR": ({"total_iters": 12, "power": 1.0}, {"total_iters": 15, "power": 2.0}),
    "CosineAnnealingLR": ({"T_max": 12, "eta_min": 0.0}, {"T_max": 20, "eta_min": 0.01}),
    "CosineAnnealingWarmRestarts": (
        {"T_0": 4, "T_mult": 1, "eta_min": 0.0},
        {"T_0": 5, "T_mult": 2, "eta_min": 0.01},
    ),
    "OneCycleLR": (
        {
            "max_lr": 1.0,
            "total_steps": 20,
            "pct_start": 0.3,
            "anneal_strategy": "cos",
            "div_factor": 25.0,
            "final_div_factor": 1e4,
            "three_phase": False,
        },
        {
            "max_lr": 2.0,
            "total_steps": 25,
            "pct_start": 0.5,
            "anneal_strategy": "linear",
            "div_factor": 10.0,
            "final_div_factor": 10.0,
            "three_phase": True,
        },
    ),
    "CyclicLR": (
        {
            "base_lr": 0.1,
            "max_lr": 1.0,
            "step_size_up": 4,
            "step_size_down": 5,
            "mode": "triangular",
            "gamma": 0.9,
        },
        {
            "base_lr": 0.2,
            "max_lr": 2.0,
            "step_size_up": 3,
            "step_size_down": 3,
            "mode": "triangular2",
            "gamma": 0.5,
        },
    ),
}
SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param(name, setting, id=f"{getattr(name, '__name__', name)}-{setting}")
        for name, (_, others) in SCHEDULES.items()
        for setting in others
    ],
)
def test_a_schedules_setting_moves_the_rate_to_where_it_would_be(name, setting):
    """After seven steps under the old one, the rates of a run that never had another."""
    kind = getattr(torch.optim.lr_scheduler, name) if isinstance(name, str) else name
    settings, others = SCHEDULES[name]
    if (name, setting) == ("CyclicLR", "gamma"):
        settings = settings | {"mode": "exp_range"}
    before, after = settings, settings | {setting: others[setting]}
    trainer, said = resumed((SGD, partial(kind, **before)), (SGD, partial(kind, **after)))
    expected = stepped(made(SGD, partial(kind, **after))[0], 20)[7:]
    assert stepped(trainer, 13) == pytest.approx(expected, rel=1e-12)
    unchanged = stepped(made(SGD, partial(kind, **before))[0], 20)[7:]
    assert expected != pytest.approx(unchanged, rel=1e-6)
    assert said or expected[0] == pytest.approx(unchanged[0], rel=1e-6)


PLATEAU = {
    "mode": "max",
    "factor": 0.5,
    "patience": 3,
    "threshold": 0.5,
    "threshold_mode": "abs",
    "cooldown": 4,
    "min_lr": 0.1,
    "eps": 0.01,
}


@pytest.mark.parametrize("setting", PLATEAU)
def test_a_schedule_that_follows_a_metric_keeps_how_far_it_has_come(setting):
    kind = lightning.pytorch.cli.ReduceLROnPlateau
    before = partial(kind, monitor="val/loss", patience=2)
    after = partial(kind, monitor="val/loss", **{"patience": 2, setting: PLATEAU[setting]})
    half = partial(torch.optim.SGD, lr=0.25)
    trainer, _ = resumed((SGD, before), (half, after))
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    first, _ = made(SGD, before)
    rate = stepped(first, 8)[-1]
    assert rate < 0.5
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate / 2)
    (whole,) = (config.scheduler for config in first.lr_scheduler_configs)
    assert scheduler.best == whole.best
    name = {"min_lr": "min_lrs"}.get(setting, setting)
    value = PLATEAU[setting]
    assert getattr(scheduler, name) == ([value] if setting == "min_lr" else value)


def test_what_has_not_changed_goes_on_as_lightning_restores_it():
    same = (SGD, partial(Warmup, total_steps=None))
    trainer, said = resumed(same, same)
    assert not said
    assert stepped(trainer, 13) == stepped(made(*same)[0], 20)[7:]


def test_an_earlier_releases_rate_is_compared_with_what_it_would_be():
    """Its checkpoints say nothing of settings: the optimiser's own numbers do."""
    same = (SGD, partial(Warmup, total_steps=None))
    assert resumed(same, same, record=False)[1] == []
    lower = partial(torch.optim.SGD, lr=0.05, momentum=0.8)
    trainer, (said,) = resumed(same, (lower, same[1]), record=False)
    assert "lr " in said
    assert "momentum 0.9 -> 0.8" in said
    expected = stepped(made(lower, same[1])[0], 20)[7:]
    assert stepped(trainer, 13) == pytest.approx(expected, rel=1e-12)


def test_a_schedule_gets_another_length_only_when_asked():
    """Cosine without warm-up: after n of N steps the rate is lr (1 + cos(pi n / N)) / 2."""

    def rate(n, N):
        return 0.5 * (1 + math.cos(math.pi * n / N)) / 2

    def run(before, after, steps, **settings):
        first = partial(Warmup, warmup=0.0, total_steps=None)
        second = partial(Warmup, warmup=0.0, **{"total_steps": None, **settings})
        trainer, _ = resumed((SGD, first), (SGD, second), steps, planned=(before, after))
        return float(trainer.optimizers[0].param_groups[0]["lr"])

    with pytest.raises(InputError) as error:
        run(10, 20, 5)
    message = str(error.value)
    for number in (f"{rate(5, 10):.4g} at step 5", "0 at step 10", f"{rate(5, 20):.4g} at the"):
        assert number in message
    for steps in (10, 20):
        assert f"--model.scheduler.total_steps {steps}" in message
        assert run(10, 20, 5, total_steps=steps) == pytest.approx(rate(5, steps))
    with pytest.raises(InputError, match="was to take 10 steps"):
        run(10, 5, 3)


def test_a_constant_rate_has_no_length():
    flat = (SGD, partial(Warmup, total_steps=None, decay="constant"))
    trainer, said = resumed(flat, flat, planned=(20, 40))
    assert not said
    assert set(stepped(trainer, 33)) == {0.5}
    with pytest.raises(InputError, match="StepLR"):
        resumed(flat, (SGD, partial(torch.optim.lr_scheduler.StepLR, step_size=3)))
    with pytest.raises(InputError, match="AdamW"):
        resumed(flat, (torch.optim.AdamW, flat[1]))


# The constants of losses: what a module computes by, which no checkpoint holds.
def constants():
    for kind in MODULES:
        for name, parameter in inspect.signature(kind).parameters.items():
            row = row_of(f"model.{name}")
            if row is not None and row.fit == "applied":
                yield pytest.param(kind, name, parameter.default, id=f"{kind.__name__}-{name}")


@pytest.mark.parametrize(("kind", "name", "default"), constants())
def test_a_constant_of_a_loss_is_not_a_checkpoints(kind, name, default):
    hint = typing.get_type_hints(kind.__init__)[name]
    choices = [one for one in typing.get_args(hint) if isinstance(one, str) and one != default]
    beside, value = {}, choices[0] if choices else 2.0 if default is None else other(default)
    if kind is Mixture:
        beside, value, default = {"objectives": [DPO(), IPO()]}, [0.5, 2.0], [1.0, 1.0]
    if name == "length_target":
        beside = {"length_penalty": 0.1}
    before, after = kind(**beside, **{name: default}), kind(**beside, **{name: value})
    running = dict(before.named_buffers())
    after.load_state_dict(running, strict=False)
    observed = operator.attrgetter("needs.reference" if name == "reference" else name)
    assert observed(after) == value != observed(before)
    assert running.keys() == dict(after.named_buffers()).keys()
