"""Tiny random models of each supported family."""

import functools

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

VOCABULARY = 96
_small = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_llama = _small | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_gemma = _llama | {"head_dim": 8, "num_hidden_layers": 3, "sliding_window": 6}
_gemma["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]

# Multi-head latent attention: queries of 8 + 4 numbers a head, values of 6.
_latent = _llama | {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_mixture = _llama | _experts | {"router_aux_loss_coef": 0.02}

FAMILIES: dict[str, dict] = {
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama | {"head_dim": 8},
    "mistral": _llama | {"sliding_window": None},
    "mistral-window": _llama | {"sliding_window": 5},
    "phi3": _llama | {"sliding_window": None},
    "gpt2": _small
    | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.1},
    "gpt_neox": _small
    | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "opt": _small
    | {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
    "olmo2": _llama,
    "gemma2": _gemma | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _gemma,
    "minicpm3": _latent,
    "deepseek_v3": _latent
    | _experts
    | {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "mixtral": _mixture | {"num_local_experts": 6, "sliding_window": None},
    "qwen2_moe": _mixture | {"num_experts": 6, "shared_expert_intermediate_size": 24},
}
# Mixtures of experts with a router loss; transformers has no reward models of the last one.
MIXTURES = {name: FAMILIES[name] for name in ("mixtral", "qwen2_moe")} | {
    "qwen3_moe": _mixture | {"num_experts": 6, "head_dim": 8},
    "olmoe": _mixture | {"num_experts": 6},
}
# Whose own code drops to float32: norms, or the weights of the chosen experts.
FLOAT32_INSIDE = {"gemma2", "gemma3_text", "deepseek_v3", *MIXTURES}


def make_scorer(family: str, dtype: torch.dtype = torch.float64, **settings) -> PreTrainedModel:
    """As :func:`make`, with a head of one output."""
    auto = AutoModelForSequenceClassification
    return make(family, dtype, auto=auto, num_labels=1, **settings)


# transformers has no sdpa for Gemma 2: its scores are soft-capped. What mixtures of experts have of
# their own is no attention.
_ONE_ATTENTION = {"gemma2": "eager"} | dict.fromkeys(
    ("deepseek_v3", "mixtral", "qwen2_moe"), "segments"
)
WITH_ATTENTION = [
    (family, attention)
    for family in FAMILIES
    for attention in ("segments", "sdpa", "eager")
    if _ONE_ATTENTION.get(family, attention) == attention
]


def make(
    family: str, dtype: torch.dtype = torch.float64, auto=AutoModelForCausalLM, **settings
) -> PreTrainedModel:
    """A model with weights large enough that every part of it moves the log-probs."""
    name = family.split("-")[0]
    config = AutoConfig.for_model(name, **((FAMILIES | MIXTURES)[family] | settings))
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    if dtype == torch.float64 and not family.startswith("gemma"):
        _keep_norms_in_float64(model)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others take no float64
    return model.to(dtype)


def _keep_norms_in_float64(model: PreTrainedModel) -> None:
    """transformers' RMS norms drop to float32, which would hide errors of ours below 1e-7."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(_rms_norm, module)


def _rms_norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * x * scale
