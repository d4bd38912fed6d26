from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from rotopo.rotation import RotationConfig


def test_trains_under_trl(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
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
