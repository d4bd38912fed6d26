"""Contract 11: the reference is the model as it was before the first step, whatever adapter goes
on it and however that starts; a resumed run has the same one."""

import inspect
import math
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.models import policy as policy_module
from rotopo.models.policy import Policy
from rotopo.models.settings import PolicyConfig
from rotopo.objectives import DPO
from tests.small_run import save_model, save_pairs

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ROWS = [
    TokenizedRow([5, 6, 7], [[8, 9, 10, 11], [12, 13, 14]], [Role.CHOSEN, Role.REJECTED], 0),
    TokenizedRow([6, 9], [[4, 9, 10], [12, 13, 7, 8, 9]], [Role.CHOSEN, Role.REJECTED], 1),
]
BATCH = collate(ROWS, 0, "packed", 1.0)
LORA = {
    "lora": {},
    "lora-random": {"init_lora_weights": False},
    "lora-gaussian": {"init_lora_weights": "gaussian"},
    "lora-orthogonal": {"init_lora_weights": "orthogonal"},
    "lora-mica": {"init_lora_weights": "mica"},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 4},
    "pissa-iterated": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "dora-pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "lora-dropout": {"lora_dropout": 0.3, "init_lora_weights": "pissa"},
    "lora-ranks": {"rank_pattern": {"v_proj": 2}, "init_lora_weights": "olora"},
    "lora-head": {"modules_to_save": ["lm_head"]},
    "lora-tokens": {"trainable_token_indices": [5, 9]},
    "lora-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
# What their defaults are too large for on a model of 32 numbers a token.
SMALL = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 40},
    "MISS": {"r": 4},
    "SHIRA": {"r": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 40},
    "FROD": {"progressbar": False},
}
REFUSED = {
    "corda": ({"init_lora_weights": "corda"}, "activations or gradients"),
    "eva": ({"init_lora_weights": "eva"}, "name its folder"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "activations or gradients"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()},
        "quantised weights",
    ),
    "kasa": ({"kasa_config": peft.KasaConfig()}, "changes 4 of the base's weights"),
}


def config_of(name: str) -> PeftConfig:
    if name in LORA:
        return LoraConfig(**{"r": 4, **LAYERS, **LORA[name]})
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    return kind(**LAYERS, **SMALL.get(name, {}))


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A tiny model and pairs of it."""
    from transformers import AutoTokenizer

    made = tmp_path_factory.mktemp("start")
    save_model(made / "model", AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    save_pairs(made / "pairs.jsonl", 20)
    return made


class Fit:
    """Three steps of DPO, and what was seen on the way.

    Args:
        folder: of model and pairs.
        policy: its settings.
        start: a checkpoint to go on from.
        settings: ``seed``, ``optimizer``, ``name`` of the folder of checkpoints, ``before``, which
            is called with the module once its model is there; and the Trainer's.
    """

    def __init__(self, folder: Path, policy: PolicyConfig, start: Path | None = None, **settings):
        torch.manual_seed(settings.pop("seed", 0))
        before = settings.pop("before", None)
        optimizer = settings.pop("optimizer", lambda p: torch.optim.SGD(p, 0.1))
        self.module = DPO(0.3, policy=policy, optimizer=optimizer)
        self.losses: list[float] = []
        self.seen: list[list[int]] = []  # rows of each step
        self.first: dict[str, torch.Tensor] = {}  # what trains, before the first step
        self.keeper = ModelCheckpoint(
            folder / f"kept-{settings.pop('name', 'run')}", every_n_train_steps=1, save_top_k=-1
        )
        data = PairwiseDataModule(
            str(folder / "model"),
            str(folder / "pairs.jsonl"),
            validation=0.0,
            pairs_per_step=4,
            cache_dir=str(folder / "cache"),
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=3,
            logger=False,
            callbacks=[self.keeper],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )
        original = self.module._step

        def seen(batch):
            if not self.seen:
                own = self.module.policy.model.named_parameters()
                self.first = {n: p.detach().clone() for n, p in own if p.requires_grad}
            self.seen.append(batch.rows.tolist())
            output = original(batch)
            self.losses.append(float(output["loss"].detach()))
            return output

        self.module._step = seen
        if before is not None:
            self.module.configure_model()
            before(self.module)
        trainer.fit(self.module, data, ckpt_path=start)

    @property
    def policy(self) -> Policy:
        return self.module.policy.eval()

    def checkpoint(self, step: int) -> Path:
        (file,) = Path(self.keeper.dirpath).glob(f"*step={step}.ckpt")
        return file


@torch.no_grad()
def log_probs(policy: Policy):
    found = policy.eval()(BATCH)
    return torch.stack(
        [found.chosen, found.rejected, found.reference_chosen, found.reference_rejected]
    )


def base_log_probs(folder: Path) -> torch.Tensor:
    """Of the model as it lies in its folder, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return torch.stack([own_log_prob(model, row, k) for k in (0, 1) for row in ROWS]).view(2, -1)


@torch.no_grad()
def own_log_prob(model, row: TokenizedRow, k: int) -> torch.Tensor:
    ids = row.responses[k]
    logits = model(torch.tensor([row.prompt + ids])).logits[0, len(row.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(ids)), ids].sum()


QUICK = ["lora", "pissa", "olora", "dora-pissa", "HRA", "FOURIERFT", "VERA", "ROTATION"]
# No layers of their own, refused by name, or among LORA.
ELSEWHERE = "ADAPTION_PROMPT POLY SHADOW ADALORA LORA LN_TUNING TRAINABLE_TOKENS"
EVERY = [*LORA] + [
    name
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if (name := str(getattr(kind, "value", kind))) not in ELSEWHERE.split()
    and "target_modules" in inspect.signature(config).parameters
]

# These start away from the model: their reference is where they start.
AWAY = {"lora-random", "lora-orthogonal", "FOURIERFT", "UNILORA", "FROD", "DEFT", "C3A", "VBLORA"}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY],
)
def test_every_adapter_starts_at_its_reference_and_resumes_with_it(folder, name, tmp_path):
    """The reference is the untouched model at step 0 and still at step 3, also of a run that goes
    on, under other random numbers, from its first step's checkpoint; and what is merged is what
    was trained."""
    path = str(folder / "model")
    config = PolicyConfig(path, config_of(name), dtype="float32")
    whole = Fit(folder, config, name=f"{name}-whole")
    if name != "lora-dropout":  # whose policy, but not its reference, is random in training
        assert whole.losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert whole.losses[-1] != whole.losses[0]
    values = log_probs(whole.policy)
    if name not in AWAY:
        torch.testing.assert_close(
            values[2:].double(), base_log_probs(folder), rtol=1e-5, atol=1e-4
        )
    resumed = Fit(folder, config, whole.checkpoint(1), name=f"{name}-resumed", seed=7)
    assert resumed.losses == whole.losses[1:]
    assert torch.equal(log_probs(resumed.policy), values)
    trained = dict(resumed.module.state_dict())
    assert trained.keys() == whole.module.state_dict().keys()
    try:
        merged = whole.policy.model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError):
        return  # PEFT merges no such adapter
    own = torch.stack([own_log_prob(merged, row, k) for k in (0, 1) for row in ROWS]).view(2, -1)
    torch.testing.assert_close(own, values[:2].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kept"), [("dora", True), ("lora", False)])
def test_another_dtype_has_the_start_of_the_checkpoint(folder, name, kept):
    """DoRA's is the identity bit for bit in float32, and not in bfloat16."""
    config = PolicyConfig(str(folder / "model"), config_of(name), dtype="bfloat16")
    fit = Fit(folder, config, name=f"half-{name}")
    assert (fit.policy.start is not None) == kept
    saved = torch.load(fit.checkpoint(3), weights_only=True)["start"]
    policy = Policy.load(PolicyConfig(**{**vars(config), "dtype": "float32"}), True)
    assert policy.start is None
    policy.start_as(saved)
    assert policy.starting_adapter()["trained"].keys() == saved["trained"].keys()
    for key, value in policy.starting_adapter()["trained"].items():
        assert torch.equal(value, saved["trained"][key])


def test_a_policy_that_is_not_its_reference_is_refused_before_the_first_step(folder):
    def move(module: DPO) -> None:
        with torch.no_grad():
            for parameter in module.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)

    config = PolicyConfig(str(folder / "model"), config_of("lora"), dtype="float32")
    with pytest.raises(InputError, match="before the first step, policy and reference differ by"):
        Fit(folder, config, before=move, name="moved")


def test_a_cache_of_another_reference_is_refused_before_the_first_step(folder, monkeypatch):
    """Whatever has let it have this one's name."""
    monkeypatch.setattr(policy_module, "fingerprint_of_reference", lambda *_: "the same")
    config = PolicyConfig(
        str(folder / "model"), config_of("lora"), dtype="float32", reference="cached"
    )
    Fit(folder, config, name="own")
    other = PolicyConfig(**{**vars(config), "adapter": config_of("lora-random")})
    with pytest.raises(InputError, match=r"the same are not this model's: remove that folder"):
        Fit(folder, other, name="others")


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_reference_is_refused_by_name(folder, name):
    settings, message = REFUSED[name]
    adapter = LoraConfig(**LAYERS, **settings)
    with pytest.raises(InputError, match=message):
        Policy.load(PolicyConfig(str(folder / "model"), adapter), needs_reference=True)


def test_adalora_whose_ranks_would_not_move_is_refused(folder):
    adapter = peft.AdaLoraConfig(**LAYERS, total_step=3)
    with pytest.raises(InputError, match="moves its ranks"):
        Policy.load(PolicyConfig(str(folder / "model"), adapter), needs_reference=True)
