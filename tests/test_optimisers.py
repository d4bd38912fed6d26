"""Groups of parameters by pattern, Muon beside torch's, and optimisers of 8 bits."""

import copy
import re
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rotopo.errors import InputError
from rotopo.optimisers import Muon, configured
from rotopo.rotation import RotationConfig
from rotopo.run import checkpoints
from tests.models.families import FAMILIES, make
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, assert_equal, fit, last_checkpoint, weights

LORA_PLUS = "{lora_B: {lr_ratio: 16}}"
MUON = ["--model.optimizer=rotopo.optimisers.Muon", "--model.optimizer.lr=0.003"]
FULL = ["--model.policy={adapter: null, dtype: float32}"]
EIGHT_BITS = ["--model.optimizer=bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr=0.001"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def adapted(adapter: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(make("llama", torch.float32), adapter)


def settings(optimizer) -> dict[torch.Tensor, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    return {
        p: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def made(model: nn.Module, patterns=None, **own) -> torch.optim.Optimizer:
    adamw = partial(torch.optim.AdamW, **{"lr": 1e-3, "weight_decay": 0.1, **own})
    return configured(adamw, None, model.named_parameters(), None, patterns)[0]["optimizer"]


def test_lora_plus_is_pefts():
    model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    ours = settings(made(model, {"lora_B": {"lr_ratio": 16}}))
    assert ours == settings(theirs)
    assert {rate for rate, _ in ours.values()} == {1e-3, 16e-3}


def test_rotations_have_no_decay_unless_a_pattern_says_so():
    model = adapted(RotationConfig(target_modules=["q_proj"]))
    trained = sum(p.requires_grad for p in model.parameters())
    assert list(settings(made(model)).values()) == [(1e-3, 0.0)] * trained
    for patterns, expected in (
        ({"rotation_": {"lr": 0.5}}, {(0.5, 0.0)}),  # of the decay it says nothing
        ({"rotation_": {"lr": 0.5, "weight_decay": 0.2}}, {(0.5, 0.2)}),
    ):
        assert set(settings(made(model, patterns)).values()) == expected


def test_of_patterns_in_one_name_each_setting_is_the_firsts_that_has_it():
    patterns = {
        r"layers\.0\.": {"lr": 0.5},
        "lora_B": {"lr_ratio": 16, "weight_decay": 0.0},
        "lora": {"weight_decay": 0.3, "betas": (0.5, 0.6)},
    }
    model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = made(model, patterns)
    found = {
        (group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups
    }
    assert found == {
        (0.5, 0.3, (0.5, 0.6)),  # layer 0, A
        (0.5, 0.0, (0.5, 0.6)),  # layer 0, B: a rate is said, so no ratio
        (1e-3, 0.3, (0.5, 0.6)),
        (16e-3, 0.0, (0.5, 0.6)),
    }
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == 4
    assert r"layers\.0\. and lora" in names


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"lora_C": {"lr": 1.0}}, "'lora_C' is in no name of a parameter that trains.*lora_A"),
        ({"q_proj.base": {"lr": 1.0}}, "no name of a parameter that trains"),  # it is frozen
        ({"*lora_B*": {"lr": 1.0}}, "no regular expression: nothing to repeat"),
        ({"lora_B": {"learning_rate": 1.0}}, "AdamW has no setting learning_rate.* lr_ratio"),
        ({"lora_B": {"lr": -1.0}}, "'lora_B': Invalid learning rate: -1.0"),
        ({"lora_B": {"lr_ratio": "16"}}, "lr_ratio is '16': it is a number"),
        ({"lora_B": {"lr": 1.0, "lr_ratio": 2}}, "lr and lr_ratio say two things"),
    ],
)
def test_what_a_pattern_cannot_mean_is_refused(patterns, expected):
    model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=expected):
        made(model, patterns)


def test_groups_through_a_run_and_its_resumption(config, caplog, capsys):
    """The monitor names them, a changed ratio counts and is said, other groups are refused."""
    options = [*CHECKPOINTS, f"--model.parameter_groups={LORA_PLUS}"]
    monitor = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.max_epochs=1"]
    cli = fit(config, "a", *options, *monitor)
    a, b = (group["lr"] for group in cli.trainer.optimizers[0].param_groups)
    assert b == 16 * a
    assert {"lr-AdamW/pg1", "lr-AdamW/lora_B"} <= cli.trainer.callback_metrics.keys()
    last = f"--ckpt_path={last_checkpoint(config.parent / 'a')}"
    longer = ["--model.scheduler.total_steps=6", *CHECKPOINTS, last]
    resumed = fit(config, "b", *longer, "--model.parameter_groups={lora_B: {lr_ratio: 4}}")
    a, b = (group["initial_lr"] for group in resumed.trainer.optimizers[0].param_groups)
    assert b == 4 * a == 0.04
    assert "initial_lr 0.16 -> 0.04" in caplog.text
    with pytest.raises(SystemExit):
        fit(config, "c", *longer, "--model.parameter_groups={lora_A: {lr_ratio: 16}}")
    assert "divide the parameters otherwise" in capsys.readouterr().err


# Muon.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 8)
        self.wide = nn.Linear(8, 12)
        self.tall = nn.Linear(12, 4)

    def loss(self, step: int) -> torch.Tensor:
        torch.manual_seed(step)
        hidden = self.wide(self.embed_tokens(torch.randint(0, 7, (5,)))).tanh()
        return (self.tall(hidden) - torch.randn(5, 4)).square().mean()


def halved(optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize(
    ("adjust", "lr", "adamw_lr"), [("match_rms_adamw", 0.01, None), ("original", 0.02, 3e-4)]
)
def test_each_share_is_torchs_bit_for_bit(adjust, lr, adamw_lr):
    """Through a schedule, and a resumption in the midst of it."""
    one, two = Net(), Net()
    beside = {"lr": lr, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    both = {**beside, "adamw_lr": adamw_lr, "adamw_betas": (0.8, 0.9)}
    ours = Muon(one.named_parameters(), **both)
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.Muon([two.wide.weight, two.tall.weight], **beside),
        torch.optim.AdamW(
            [two.embed_tokens.weight, two.wide.bias, two.tall.bias],
            lr=adamw_lr or lr,
            betas=(0.8, 0.9),
            weight_decay=0.1,
        ),
    ]
    schedule, schedules = halved(ours), [halved(part) for part in theirs]
    for step in range(6):
        if step == 3:
            states = copy.deepcopy((one.state_dict(), ours.state_dict(), schedule.state_dict()))
            one = Net()
            ours = Muon(one.named_parameters(), **both)
            schedule = halved(ours)
            for part, state in zip((one, ours, schedule), states, strict=True):
                part.load_state_dict(state)
        one.zero_grad()
        ours.step(lambda net=one, step=step: _backward(net.loss(step)))
        two.zero_grad()
        two.loss(step).backward()
        for part in (schedule, *theirs, *schedules):
            part.step()
        for ours_, theirs_ in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(ours_, theirs_)


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_heads_are_adamws_and_layers_matrices_muons(family):
    model = make(family, torch.float32)
    apart = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    layers = re.compile(r"(layers|h|blocks)\.\d+\.")
    optimizer = Muon(model.named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            in_layers = p.ndim == 2 and bool(layers.search(names[id(p)]))
            expected = "Muon" if in_layers and id(p) not in apart else "AdamW"
            assert group["algorithm"] == expected, names[id(p)]


def test_loras_matrices_are_muons_and_other_adapters_parameters_adamws():
    optimizer = Muon(adapted(peft.LoraConfig(r=4, target_modules=["q_proj"])).named_parameters())
    (group,) = (g for g in optimizer.param_groups if g["algorithm"] == "Muon")
    assert {tuple(p.shape) for p in group["params"] if p.requires_grad} == {(4, 32), (32, 4)}
    kinds = (RotationConfig, peft.OFTConfig, peft.HRAConfig)
    for kind in kinds:
        model = adapted(kind(target_modules=["q_proj"]))
        with pytest.raises(InputError, match=r"nothing is a matrix.*take torch.optim.AdamW"):
            configured(partial(Muon, lr=1e-3), None, model.named_parameters(), None)


def test_what_muon_cannot_do_is_refused():
    net = Net()
    with pytest.raises(InputError, match=r"give it model.named_parameters\(\)"):
        Muon(net.parameters())
    with pytest.raises(InputError, match=r"of another kind than AdamW's.*set adamw_lr"):
        Muon(net.named_parameters(), lr=0.02, adjust_lr_fn="original")
    with pytest.raises(ValueError, match="Learning rate should be >= 0"):
        Muon(net.named_parameters(), lr=-1.0)


def test_a_pattern_may_set_either_share():
    optimizer = configured(
        partial(Muon, lr=0.01),
        None,
        Net().named_parameters(),
        None,
        {"tall": {"momentum": 0.5}, "embed": {"lr_ratio": 2, "adamw_betas": (0.5, 0.6)}},
    )[0]["optimizer"]
    found = {group["name"]: group for group in optimizer.param_groups}
    assert found["tall/Muon"]["momentum"] == 0.5
    assert found["pg1/Muon"]["momentum"] == 0.95
    assert (found["embed/AdamW"]["lr"], found["embed/AdamW"]["betas"]) == (0.02, (0.5, 0.6))
    assert len(found) == len(optimizer.param_groups) == 5


def resumes_to_the_same_weights(config, options):
    whole = fit(config, "whole", *CHECKPOINTS, *options)
    (second,) = (config.parent / "whole").rglob("*step=2.ckpt")
    resumed = fit(config, "resumed", *CHECKPOINTS, *options, f"--ckpt_path={second}")
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)
    assert len(checkpoints.read(second)["optimizer_states"][0]["state"]) == len(weights(whole))
    return resumed.trainer.optimizers[0].state.values()


def test_muons_run_resumes_to_the_same_weights(config):
    resumes_to_the_same_weights(config, [*MUON, f"--model.parameter_groups={LORA_PLUS}"])


@pytest.mark.slow
def test_so_does_one_of_8_bits(config):
    """On a processor, where bitsandbytes has kernels too; all weights, since it keeps the state of
    fewer than 4,096 numbers in 32 bits."""
    states = resumes_to_the_same_weights(config, [*EIGHT_BITS, *FULL])
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_muon_on_two_ranks_is_muon_on_one(config, how):
    """A matrix is whole where it is made orthogonal, in bfloat16."""
    options = [*MUON, *FULL, *CHECKPOINTS, "--trainer.max_epochs=1"]
    one = fit(config, "one", *options, "--trainer.accumulate_grad_batches=2")
    root = f"--trainer.default_root_dir={config.parent / 'two'}"
    on_ranks(2, "fit", "--config", str(config), root, *options, *strategy(how))
    two = checkpoints.read(last_checkpoint(config.parent / "two"))["state_dict"]
    assert_equal(two, weights(one), rtol=1e-5, atol=3e-5)
