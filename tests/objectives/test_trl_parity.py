"""DPO beside TRL 1.16's DPOTrainer on the same token ids, and where the loss begins.

Everything on TRL's side is computed by TRL: its collator, its loss, the metrics that it logs, and
for the optimiser steps its whole training loop. Policy and reference differ from the start, so
that no number compared here is a constant.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer

from rotopo.data.batch import PairBatch, Role, TokenizedRow, collate
from rotopo.models.policy import PolicyConfig
from rotopo.objectives import DPO
from rotopo.rotation import RotationConfig
from tests.models.families import make
from tests.objectives.trl_side import (
    LAYOUTS,
    PAIRS,
    difference,
    encode,
    gradients,
    largest,
    lora,
    moved_policy,
    real_model_and_pairs,
    trainable,
    trl_inputs,
    trl_row,
    trl_trainer,
)

BETA = 0.3
# AdamW's epsilon is well above the rounding of a gradient: where a gradient is zero but for
# rounding, Adam would otherwise move the weight by a learning rate in a direction of chance.
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-4}
CLIP = 0.5

trains = pytest.mark.parametrize("trained", ["lora", "full"])


def our_module(
    model: PreTrainedModel, adapter: PeftConfig | None, beta: float = BETA, **optimizer
) -> DPO:
    config = PolicyConfig(path="", adapter=adapter)
    module = DPO(beta, policy=config, optimizer=partial(torch.optim.AdamW, **(ADAM | optimizer)))
    module.policy = moved_policy(model, adapter)
    return module


def dpo_trainer(
    module: DPO,
    model: PreTrainedModel,
    adapter: PeftConfig | None,
    rows: list[TokenizedRow],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **settings,
) -> DPOTrainer:
    """TRL's trainer of the same weights on the same token ids, in the order of the rows."""
    trainer = trl_trainer(
        "dpo",
        module.policy,
        model,
        adapter,
        tokenizer,
        folder,
        beta=BETA,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        learning_rate=ADAM["lr"],
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_epsilon=ADAM["eps"],
        max_grad_norm=CLIP,
        **settings,
    )
    trainer.train_dataset = Dataset.from_list([trl_row(row) for row in rows])
    return trainer


def trl_numbers(trainer: DPOTrainer, rows: list[TokenizedRow]) -> dict[str, list[float]]:
    """What TRL logs of each pair, a batch of one at a time."""
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    found: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        with torch.no_grad():
            trainer.compute_loss(trainer.model, trl_inputs(trainer, [row]))
        for name in names:
            found[name].append(trainer._metrics["train"][name][-1])
    return found


def check_parity(module: DPO, trainer: DPOTrainer, rows: list[TokenizedRow], order: list[int]):
    """Loss, log-probs, rewards and gradients, ours in another order and in both layouts."""
    inputs = trl_inputs(trainer, rows)
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
    trainer = dpo_trainer(module, model, adapter, rows, tiny_tokenizer, tmp_path)
    check_parity(module, trainer, rows, order=[4, 0, 5, 2, 1, 3])


@pytest.mark.slow
@trains
def test_the_same_of_a_real_model_on_real_pairs(trained, tmp_path):
    model, tokenizer, rows = real_model_and_pairs(800)
    adapter = lora() if trained == "lora" else None
    torch.manual_seed(1)
    module = our_module(model, adapter).train()
    trainer = dpo_trainer(module, model, adapter, rows, tokenizer, tmp_path)
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
    theirs = dpo_trainer(
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
        assert largest((step["pairs"].chosen, step["pairs"].rejected)) == 0
