from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from rotopo.rotation import RotationConfig


def tiny_config(tokenizer: PreTrainedTokenizerFast, **settings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )


def test_trains_under_trl(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    torch.manual_seed(0)
    config = tiny_config(tiny_tokenizer)
    base = LlamaForCausalLM(config)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    rows = {
        "prompt": ["The film?", "The cast?", "The end?", "The sets?"],
        "chosen": [" It moves.", " All shine.", " Earned.", " Rich."],
        "rejected": [" Plain and long.", " No.", " It ends.", " Card."],
    }
    settings = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=base,
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer,
        peft_config=RotationConfig(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The first step starts from the reference: ln 2 exactly. The second does not.
    assert abs(losses[0] - 0.693147) < 1e-5
    assert abs(losses[1] - 0.693147) > 1e-5
    assert isinstance(trainer.model, PeftModel)
    moved = 0
    for name, p in trainer.model.base_model.model.named_parameters():
        if "rotation_adapter" in name:
            moved += 1
            assert p.abs().max() > 1e-3
        else:
            assert torch.equal(p, frozen[name.replace("base_layer.", "")])
    assert moved == 2 * 2 * 3

    trainer.save_model(tmp_path / "adapter")
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(frozen, strict=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "settings", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}], ids=["task", "named"]
)
def test_a_reward_model_keeps_its_head(
    settings: dict, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
):
    torch.manual_seed(0)
    config = tiny_config(tiny_tokenizer, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id)
    base = LlamaForSequenceClassification(config)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer = RewardTrainer(
        model=base,
        args=RewardConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"chosen": ["It moves.", "All shine."], "rejected": ["Plain and long.", "No."]}
        ),
        processing_class=tiny_tokenizer,
        peft_config=RotationConfig(**settings),
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    # The head of the new model is another one, as where transformers makes it anew.
    fresh = LlamaForSequenceClassification(config)
    fresh.load_state_dict({n: p for n, p in frozen.items() if "score" not in n}, strict=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    head = loaded.base_model.model.score.modules_to_save["default"].weight
    assert (head - frozen["score.weight"]).abs().max() > 1e-3
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
