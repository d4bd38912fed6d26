"""Compiling decoder layers, and whether a run is long enough to win back what that takes."""

import importlib.util
import os
import shutil

import torch
from transformers import PreTrainedModel

from rotopo.errors import InputError
from rotopo.models.adapter_inputs import keep_inputs_as_autograd_does
from rotopo.models.settings import BackboneConfig
from rotopo.models.sharding import decoder_layers

# Families that tests train compiled, and two of llama's make; others, and a model's own code, only
# where a user says so.
_TRIED = {"llama", "gpt2", "gemma3_text", "minicpm3", "qwen2", "mistral"}


def obstacle(model: PreTrainedModel) -> str:
    """Why a model's layers cannot be compiled here; empty where they can."""
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler; install g++"
    if model.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton for a GPU; install it"
    if not decoder_layers(model):
        return f"{type(model).__name__} does not name its layers"
    return ""


def compile_layers(model: PreTrainedModel, setting: str) -> None:
    """Compile each decoder layer for batches of any shape; equal layers share the result.

    Args:
        model: the Hugging Face model, with adapters in its layers or without.
        setting: what messages call its settings.

    Raises:
        InputError: see :func:`obstacle`.
    """
    if reason := obstacle(model):
        raise InputError(f"{setting}.compile: {reason}, or set it to false.")
    # A graph each for policy and reference, training and evaluation, the first layer and the rest;
    # beyond torch's limit of 8 it would go on uncompiled.
    torch._dynamo.config.recompile_limit = 32
    for layer in decoder_layers(model):
        keep_inputs_as_autograd_does(layer)
        layer.compile(dynamic=True)


# Seconds: what compiling takes, whatever the number of layers; and what it saves of a token in a
# layer, forward and backward, per unit of the hidden size [ours: measured on a model of
# SmolLM2-135M's size, LoRA, bfloat16, one thread; for a GPU a guess, nothing has been measured].
_COMPILING = 60.0
_SAVED = {"cpu": 5e-8, "cuda": 5e-10}


def why_not(config: BackboneConfig, model: PreTrainedModel, steps: float, tokens: float) -> str:
    """Why ``compile: auto`` leaves a fit uncompiled; empty where it is worth it.

    It asks no clock, so that the same settings give the same answer.

    Args:
        config: the model's settings.
        model: the model.
        steps: optimiser steps of the whole fit.
        tokens: that one process computes in a step.
    """
    if config.quantize is not None:
        return "the base is quantised"
    if config.attention == "flex_attention":
        return "flex_attention is compiled already"
    if model.config.model_type not in _TRIED or config.trust_remote_code:
        return f"compiling {model.config.model_type} has not been tried"
    if reason := obstacle(model):
        return reason
    text = model.config.get_text_config()
    rate = _SAVED.get(model.device.type, 0.0)
    saved = rate * steps * tokens * text.num_hidden_layers * text.hidden_size
    if saved < 2 * _COMPILING:  # a margin for what the estimate does not know
        return f"{steps:.0f} steps would not win back some {_COMPILING:.0f} s"
    return ""
