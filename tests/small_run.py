"""A tiny model, a few pairs, and the command line on them."""

import json
import random
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "a film of some wit and no heart that all will see twice or not at all".split()  # noqa: SIM905


def save_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden_size: int = 32
) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pairs(file: Path, n: int = 40) -> Path:
    generator = random.Random(0)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, 9)))

    rows = [{"prompt": f"{i}: {text()}", "chosen": text(), "rejected": text()} for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def save_config(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole run: LoRA with dropout on a tiny float32 model, three steps of six pairs an epoch."""
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "rotopo.objectives.DPO",
            "init_args": {
                "beta": 0.3,
                "policy": {
                    "path": str(save_model(folder / "model", tokenizer)),
                    "dtype": "float32",
                    "adapter": {
                        "class_path": "peft.LoraConfig",
                        "init_args": {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj"]},
                    },
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "scheduler": {"class_path": "rotopo.training.Warmup"},
                "sampling": {"max_new_tokens": 4},
            },
        },
        "data": {
            "class_path": "rotopo.data.module.PairwiseDataModule",
            "init_args": {
                "source": str(save_pairs(folder / "pairs.jsonl")),
                "validation": 0.2,
                "test": 0.3,
                "pairs_per_step": 6,
                "cache_dir": str(folder / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "default_root_dir": str(folder / "runs"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file
