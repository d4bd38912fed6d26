"""Hugging Face models by name, folder, GGUF file or package resource, with an adapter on them."""

import copy
import hashlib
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from rotopo.errors import InputError
from rotopo.models import beside
from rotopo.models.adapter_inputs import keep_inputs_as_they_come
from rotopo.models.mixed_precision import compute_dtype
from rotopo.models.moved_base import Base, moves_base, refuse_initialisation, sample
from rotopo.models.quantized import compute_as_in_training, quantized
from rotopo.models.saved_adapter import SavedAdapter
from rotopo.models.settings import BackboneConfig, DtypeName, Quantization
from rotopo.models.sharding import Sharding
from rotopo.pretrained import conversion_advice, first_line, pretrained_folder


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


def trained_dtype(config: BackboneConfig) -> torch.dtype:
    """The dtype to load a model in: without an adapter ``auto`` is float32.

    Warns of weights of the model that train in a half type.

    Raises:
        InputError: see :func:`rotopo.models.mixed_precision.compute_dtype`.
    """
    compute_dtype(config)
    name: DtypeName = config.dtype
    if config.adapter is None:
        if name == "auto":
            name = "float32"
        elif name in ("bfloat16", "float16"):
            warnings.warn(
                f"Full fine-tuning in {name}: a weight of it loses the optimiser's small steps, so "
                f"that most weights may stay as they are; {config.setting}.dtype float32 keeps "
                f"them, and {config.setting}.compute_dtype bfloat16 computes in bfloat16 all the "
                "same.",
                stacklevel=2,
            )
    dtype = resolve_dtype(name)
    whole = getattr(config.adapter, "modules_to_save", None)
    if whole and dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"{config.setting}.adapter trains whole modules ({', '.join(whole)}) in the model's "
            f"dtype, and {str(dtype).removeprefix('torch.')} loses the optimiser's small steps: "
            f"{config.setting}.dtype float32 keeps them.",
            stacklevel=2,
        )
    return dtype


def load_config(
    path: str, setting: str = "policy", trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of the model at ``path``, with every dropout of the base set to zero.

    Dropout in the base would make policy and reference differ before training, and so would the
    noise that some routers of experts add to their input; an adapter's own dropout is left alone.
    Warns of a family that is random in training in a way that cannot be switched off.
    """
    folder = pretrained_folder(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No model at {path!r}: give {setting}.path a model's name on the Hub, a folder, a "
            f"GGUF file, or package:PACKAGE/FILE. ({first_line(error)}){conversion_advice(path)}"
        ) from error
    sampled = config.model_type == "phimoe"  # whose router_jitter_noise says what near ties are
    if sampled:
        warnings.warn(
            "phimoe chooses at random between experts that are nearly tied while it trains: "
            "policy and reference differ by that, before training too.",
            stacklevel=2,
        )
    for name, value in config.to_dict().items():
        noise = "jitter" in name and not (sampled and name == "router_jitter_noise")
        if ("drop" in name or noise) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_as_set(
    load: Callable[..., PreTrainedModel],
    config: BackboneConfig,
    sharding: Sharding | None,
    dtype: torch.dtype | None = None,
    merges: bool = False,
) -> tuple[PreTrainedModel, torch.dtype, PreTrainedModel]:
    """A model as its settings say, the dtype that they give its weights, and the model that it is
    known by (see :func:`fingerprint`): itself, or what it was before it was quantised.

    Args:
        load: takes the arguments of :func:`load_model`.
        config: the settings.
        sharding: how the model is to be divided among ranks: its weights stay in their file, unless
            they are changed before that.
        dtype: of the weights instead of the settings'.
        merges: whether an adapter is going to be merged into it.

    Raises:
        InputError: settings that do not work, or a model to quantise that is quantised already.
    """
    trained = trained_dtype(config)
    settings = quantized(config, dtype or trained, sharding)
    arguments = (config.attention, config.trust_remote_code)
    changed = merges or moves_base(config.adapter)
    divided = sharding is not None and not settings and not changed
    model = load(config.path, None if divided else dtype or trained, *arguments, **settings)
    if (dtype or trained) == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped products in float64
    compute_as_in_training(model)
    if not settings:
        return model, trained, model
    quantizer: Any = model.hf_quantizer
    if quantizer.pre_quantized:
        raise InputError(
            f"{config.setting}.quantize: {config.path!r} is quantised already: leave it out."
        )
    with torch.device("cpu"):  # mapped to memory, wherever the quantised one is
        return model, trained, load(config.path, None, *arguments)


def load_model(
    path: str,
    dtype: torch.dtype | None,
    attention: str,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """A causal language model.

    Args:
        path: see :func:`rotopo.pretrained.pretrained_folder`.
        dtype: dtype of the weights; None leaves them in their file, mapped to memory.
        attention: the attention implementation, as transformers names it.
        trust_remote_code: see :class:`.BackboneConfig`.
        settings: of :func:`rotopo.models.quantized.quantized`.

    Raises:
        InputError: no such model, or it has no such attention.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    if dtype is None:
        config.dtype = None  # else auto is what the configuration says, not what the file holds
    try:
        return AutoModelForCausalLM.from_pretrained(
            pretrained_folder(path),
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            **settings,
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(
            f"Cannot load policy.path {path!r} with policy.attention {attention!r}: "
            f"{first_line(error)}{conversion_advice(path)}"
        ) from error


def adapt(
    model: PreTrainedModel,
    config: BackboneConfig,
    head: nn.Module,
    goes_on: SavedAdapter | None = None,
) -> tuple[PreTrainedModel | PeftModel, dict[str, Tensor]]:
    """Put the adapter on a model, if there is one, and switch activation checkpointing on.

    Args:
        model: the model, as loaded.
        config: its settings.
        head: the model's head, which ``all-linear`` leaves out.
        goes_on: what gives the adapter its values, if it has been trained before.

    Returns:
        the model; and by layer the weights that the base had, where the adapter has changed them,
        see :mod:`rotopo.models.moved_base`.

    Raises:
        InputError: an adapter that does not fit the model or works on the prompt, or settings
            that do not go together.
    """
    adapted: PreTrainedModel | PeftModel = model
    moved: dict[str, Tensor] = {}
    if config.adapter is not None:
        name = f"{config.setting}.adapter"
        if config.adapter.is_prompt_learning:
            raise InputError(
                f"{name}: {type(config.adapter).__name__} adds tokens to the prompt; take an "
                "adapter that changes layers (LoRA, rotation, OFT, ...)."
            )
        beside.refuse_tokens(beside.embeddings(model), config.adapter, name)
        refuse_initialisation(config.adapter, name)
        base = Base(model, config.adapter)
        # By it PEFT knows what all-linear leaves out.
        model.get_output_embeddings = lambda: head  # type: ignore[method-assign]
        try:
            # A copy: PEFT writes into the configuration what it found in the model.
            adapted = cast(PeftModel, get_peft_model(model, copy.deepcopy(config.adapter)))
        except (ValueError, TypeError, AssertionError, AttributeError) as error:
            raise InputError(f"{name} ({type(config.adapter).__name__}): {error}") from error
        finally:
            del model.get_output_embeddings
        beside.refuse(model, config.adapter, name)
        moved = base.moved(model, name)
        if goes_on is not None and not beside.embeddings(model).is_meta:
            goes_on.load_into(cast(PeftModel, adapted))
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        keep_inputs_as_they_come(model)
    return adapted, moved


def fingerprint(
    model: nn.Module, dtype: torch.dtype | None = None, quantize: Quantization | None = None
) -> str:
    """A short hash that tells base models apart: names, shapes and a sample of every weight.

    The sample is rounded to bfloat16 first, so that the dtype a model is loaded in does not
    count. Quantised bases have the name of the bits behind it, and are known by the weights before
    that, since processors and GPUs round a few of them to different sides.

    Args:
        model: as loaded, but not quantised.
        dtype: the dtype that its weights will be converted to, if they still are in another.
        quantize: how they are quantised, if they are.

    Returns:
        Nothing of a model without values (:mod:`rotopo.plan`).
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return ""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        few = sample(parameter).to("cpu", dtype).to(torch.bfloat16)
        digest.update(few.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16] + (f"-{quantize}" if quantize else "")
