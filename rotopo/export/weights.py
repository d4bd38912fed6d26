"""A checkpoint's weights and its tokenizer as files, and those files as their users load them."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from rotopo.errors import InputError
from rotopo.export.job import Job
from rotopo.export.outputs import largest_difference, policy_logits, scorer_rewards
from rotopo.models.beside import untie
from rotopo.models.moved_base import save_for_untouched_base
from rotopo.models.policy import Policy
from rotopo.models.scorer import Scorer
from rotopo.pretrained import pretrained_folder


@dataclass(frozen=True)
class Trained:
    """What the trained module says of the probes, and its numbers of parameters.

    Attributes:
        outputs: of each response logits [positions, V], or the reward [1].
        scale: what differences of outputs are a share of.
        moved: the largest difference that training has made to a logit; None of a reward model,
            whose head was drawn at random.
        trained: parameters that were trained.
        parameters: all of them.
        hidden_size: D.
    """

    outputs: list[Tensor]
    scale: float
    moved: float | None
    trained: int
    parameters: int
    hidden_size: int


def write(job: Job, state: dict[str, Any], folder: Path) -> Trained:
    """Load the checkpoint, see what it says of the probes, and write it.

    The model is merged in place, and nothing of it is left in memory afterwards.
    """
    module: Any = job.module
    config = replace(
        job.given,
        attention="segments"  # which is the same, and not on GPUs only
        if job.config.attention == "flex_attention"
        else job.config.attention,
        activation_checkpointing=False,
        compile=False,
        quantize=None,
        compute_dtype=None,
    )
    backbone: Policy | Scorer
    before: list[Tensor] | None = None
    if job.kind == "reward":
        module.scorer = backbone = Scorer.load(config, dtype=job.wide)
        backbone.eval()
    else:
        module.policy = backbone = Policy.load(config, False, dtype=job.wide)  # type: ignore[arg-type]
        backbone.eval()
    if job.config.quantize is not None:
        backbone.base_fingerprint += f"-{job.config.quantize}"  # as training knew these weights
    try:
        try:
            module.on_load_checkpoint(state)
        except InputError as error:
            raise InputError(str(error).replace("ckpt_path", "checkpoint", 1)) from error
        if isinstance(backbone, Policy):
            before = policy_logits(backbone, job)
        module.load_state_dict(state["state_dict"], strict=False)
        if isinstance(backbone, Scorer):
            outputs, scale = scorer_rewards(backbone, job)
        else:
            outputs = policy_logits(backbone, job)
            scale = max(float(logits.abs().max()) for logits in outputs)
        moved = None if before is None else largest_difference(before, outputs)
        parameters = list(backbone.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        every = sum(p.numel() for p in parameters)
        del parameters
        hidden_size = backbone.language_model.config.get_text_config().hidden_size
        _save(backbone, job, folder)
    finally:
        module.policy = module.scorer = None
    return Trained(outputs, scale, moved, trained, every, hidden_size)


def _save(backbone: Policy | Scorer, job: Job, folder: Path) -> None:
    """Write a model, which is not to be used afterwards, and its tokenizer."""
    model: Any = backbone.model
    tokenizer = _exported_tokenizer(job)
    if job.kind != "reward":
        generation = model.generation_config
        generation._from_model_config = False
        generation.eos_token_id = job.data.stop_ids
        generation.pad_token_id = tokenizer.pad_token_id
        if not generation.do_sample:  # else some models' own settings do not go together
            generation.temperature = generation.top_p = generation.top_k = None
    if job.kind == "adapter":
        config = model.peft_config["default"]
        config.base_model_name_or_path = job.config.path
        config.task_type = "CAUSAL_LM"
        if backbone.moved:
            assert backbone.start is not None
            save_for_untouched_base(model, backbone.start.tensors(), folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)
        generation.save_pretrained(folder)
    else:
        merged = model
        if isinstance(model, PeftModel):
            untie(model.get_base_model())
            merged = model.merge_and_unload()
        merged.to(job.written)
        for config in (merged.config, merged.config.get_text_config()):
            config.pad_token_id = tokenizer.pad_token_id
        merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _exported_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    encoder = job.data.encoder
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = encoder.exported_template(closed=job.kind == "reward")
    return tokenizer


def load_written(job: Job, folder: Path) -> Any:
    """What was written, as its users load it."""
    settings: Any = {"dtype": job.wide, "trust_remote_code": job.config.trust_remote_code}
    if job.kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    elif job.kind == "merged":
        model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    else:
        base = pretrained_folder(job.config.path)
        model = AutoModelForCausalLM.from_pretrained(base, **settings)
        model = PeftModel.from_pretrained(model, folder)
    return model.eval()
