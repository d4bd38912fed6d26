"""Hugging Face models and tokenizers by name, folder, GGUF file or package resource."""

import hashlib
import os
import shutil

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotopo.errors import InputError
from rotopo.models.segment_attention import segment_attention
from rotopo.models.settings import DtypeName
from rotopo.pretrained import first_line, pretrained_folder


def resolve_dtype(name: DtypeName) -> torch.dtype:
    """``auto`` is bfloat16 where the processor multiplies matrices in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.backends.mkldnn.is_available() and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return torch.bfloat16 if fast else torch.float32


def load_config(path: str) -> PretrainedConfig:
    """The configuration of the model at ``path``, with every dropout of the base set to zero.

    Dropout in the base would make policy and reference differ before training; an adapter's own
    dropout is left alone.
    """
    folder = pretrained_folder(path)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No model at {path!r}: give policy.path a model's name on the Hub, a folder, a GGUF "
            f"file, or package:PACKAGE/FILE. ({first_line(error)})"
        ) from error
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_model(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A causal language model.

    Args:
        path: see :func:`rotopo.pretrained.pretrained_folder`.
        dtype: dtype of the weights.
        attention: the attention implementation, as transformers names it.

    Raises:
        InputError: no such model, or it has no such attention.
    """
    config = load_config(path)
    try:
        return AutoModelForCausalLM.from_pretrained(
            pretrained_folder(path), config=config, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(
            f"Cannot load policy.path {path!r} with policy.attention {attention!r}: "
            f"{first_line(error)}"
        ) from error


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer for batches of any shape; equal layers share the result.

    Raises:
        InputError: no C++ compiler here, or the model does not say which modules its layers are.
    """
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise InputError("policy.compile: torch.compile needs a C++ compiler; install g++.")
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(f"policy.compile: {type(model).__name__} does not name its layers.")
    # Its blocks hang on the mask, where the compiler does not see them.
    outside = torch.compiler.disable(segment_attention, reason="blocks that hang on the mask")
    ALL_ATTENTION_FUNCTIONS.register("segments", outside)
    # A graph each for policy and reference, training and evaluation, the first layer and the rest;
    # beyond torch's limit of 8 it would go on uncompiled.
    torch._dynamo.config.recompile_limit = 32
    for layer in layers:
        layer.compile(dynamic=True)


def fingerprint(model: nn.Module) -> str:
    """A short hash that tells base models apart: names, shapes and a sample of every weight.

    The sample is rounded to bfloat16 first, so that the dtype a model is loaded in does not
    count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
