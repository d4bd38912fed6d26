"""Hugging Face models by name, folder, GGUF file or package resource, with an adapter on them."""

import copy
import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from rotopo.data.batch import Layout, PairBatch
from rotopo.errors import InputError
from rotopo.models import beside
from rotopo.models.attention import attention_inputs
from rotopo.models.compilation import compile_layers
from rotopo.models.mixed_precision import Masters, compute_dtype, in_compute_dtype
from rotopo.models.quantized import compute_as_in_training, quantized
from rotopo.models.router import RouterLoss
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
) -> tuple[PreTrainedModel, torch.dtype, PreTrainedModel]:
    """A model as its settings say, the dtype that they give its weights, and the model that it is
    known by (see :func:`fingerprint`): itself, or what it was before it was quantised.

    Args:
        load: takes the arguments of :func:`load_model`.
        config: the settings.
        sharding: how the model is to be divided among ranks: its weights stay in their file.
        dtype: of the weights instead of the settings'.

    Raises:
        InputError: settings that do not work, or a model to quantise that is quantised already.
    """
    trained = trained_dtype(config)
    settings = quantized(config, dtype or trained, sharding)
    arguments = (config.attention, config.trust_remote_code)
    divided = sharding is not None and not settings
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
    model: PreTrainedModel, config: BackboneConfig, head: nn.Module
) -> PreTrainedModel | PeftModel:
    """Put the adapter on a model, if there is one, and switch activation checkpointing on.

    Args:
        model: the model, as loaded.
        config: its settings.
        head: the model's head, which ``all-linear`` leaves out.

    Raises:
        InputError: an adapter that does not fit the model or works on the prompt, or settings
            that do not go together.
    """
    adapted: PreTrainedModel | PeftModel = model
    if config.adapter is not None:
        name = f"{config.setting}.adapter"
        if config.adapter.is_prompt_learning:
            raise InputError(
                f"{name}: {type(config.adapter).__name__} adds tokens to the prompt; take an "
                "adapter that changes layers (LoRA, rotation, OFT, ...)."
            )
        beside.refuse_tokens(embeddings(model), config.adapter, name)
        # By it PEFT knows what all-linear leaves out.
        model.get_output_embeddings = lambda: head  # type: ignore[method-assign]
        try:
            # A copy: PEFT writes into the configuration what it found in the model.
            adapted = cast(PeftModel, get_peft_model(model, copy.deepcopy(config.adapter)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{name} ({type(config.adapter).__name__}): {error}") from error
        finally:
            del model.get_output_embeddings
        beside.refuse(model, config.adapter, name)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def embeddings(model: PreTrainedModel) -> Tensor:
    """The weight of the input embeddings [V, D], without what an adapter trains of it."""
    return cast(Tensor, beside.original(model.get_input_embeddings()).weight)


def decoder_inputs(model: PreTrainedModel, batch: PairBatch) -> dict[str, Any]:
    """What the decoder takes beside token ids, the same for policy and reference."""
    return attention_inputs(batch, model.config.get_text_config(), embeddings(model).dtype)


def hidden_states(
    model: PreTrainedModel, batch: PairBatch, inputs: dict[str, Any], index: Tensor
) -> Tensor:
    """The decoder's last hidden states of the tokens at a flat index [N] -> [N, D]."""
    outputs = model.base_model(input_ids=batch.input_ids, use_cache=False, **inputs)
    return outputs.last_hidden_state.flatten(0, 1)[index]


def layer_states(model: PreTrainedModel, batch: PairBatch) -> list[Tensor]:
    """Hidden states of all tokens but padding, behind the embeddings and behind each layer.

    Returns:
        Each [tokens, D], in at least float32.
    """
    outputs = model.base_model(
        input_ids=batch.input_ids,
        use_cache=False,
        output_hidden_states=True,
        **decoder_inputs(model, batch),
    )
    real = batch.segment_ids.flatten() >= 0
    wide = torch.promote_types(embeddings(model).dtype, torch.float32)
    return [state.flatten(0, 1)[real].to(wide) for state in outputs.hidden_states]


def rounding(model: PreTrainedModel, states: Tensor) -> float:
    """The machine epsilon of what a model computes in, under autocast or not."""
    weight = embeddings(model)
    kind = weight.device.type
    cast_to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return max(torch.finfo(dtype).eps for dtype in (weight.dtype, states.dtype, cast_to))


class Backbone(nn.Module):
    """Parent of policies and reward models: a model whose layouts are checked at first use.

    Args:
        model: the Hugging Face model, with or without a PEFT adapter.
        base_fingerprint: see :func:`fingerprint`.
        reference: a frozen copy, if there is one.

    Attributes:
        sharding: how the model is divided among ranks, if it is.
        masters: what puts copies in the places of weights to compute with, if something does.
        router: the router loss that the model is trained with, if it is.
        router_loss: its value for the last batch [], with its gradient.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        base_fingerprint: str,
        reference: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.base_fingerprint = base_fingerprint
        self.reference = reference
        self.compiled = False
        self.sharding: Sharding | None = None
        self.masters: Masters | None = None
        self._compute_dtype: torch.dtype | None = None
        self.router: RouterLoss | None = None
        self.router_loss: Tensor | None = None
        self._checked: set[Layout] = set()

    @property
    def language_model(self) -> PreTrainedModel:
        """The Hugging Face model; adapted layers sit inside it."""
        model = self.model
        if isinstance(model, PeftModel):
            return cast(PreTrainedModel, model.get_base_model())
        return model

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in, autocast aside."""
        return self._compute_dtype or embeddings(self.language_model).dtype

    @property
    def device(self) -> torch.device:
        """Where batches have to be: an offloaded model's weights are elsewhere."""
        if self.sharding is not None:
            return self.sharding.device
        return embeddings(self.language_model).device

    def compile_layers(self, setting: str) -> None:
        """Compile the decoder layers of the model and of a frozen copy.

        Raises:
            InputError: see :func:`rotopo.models.compilation.compile_layers`.
        """
        for model in (self.language_model, self.reference):
            if model is not None:
                compile_layers(model, setting)
        self.compiled = True

    def trained_states(self, batch: PairBatch, inputs: dict[str, Any], index: Tensor) -> Tensor:
        """As :func:`hidden_states`, of what trains; keeps the router loss of the same pass."""
        if self.router is None:
            return hidden_states(self.language_model, batch, inputs, index)
        decoder = self.language_model.base_model
        outputs = decoder(
            input_ids=batch.input_ids, use_cache=False, output_router_logits=True, **inputs
        )
        self.router_loss = self.router(batch, outputs)
        return outputs.last_hidden_state.flatten(0, 1)[index]

    def compute_in(self, dtype: torch.dtype, apart: Sequence[nn.Module], divided: bool) -> None:
        """Keep the weights as they are, and compute in another dtype.

        Args:
            dtype: of the copies that are computed with.
            apart: modules whose own weights are computed with as they are.
            divided: whether the strategy makes the copies.
        """
        self._compute_dtype = dtype
        if not divided:
            self.masters = Masters(self.language_model, dtype, apart)

    @torch.no_grad()
    @in_compute_dtype
    def hidden_states(self, batch: PairBatch, reference: bool = False) -> list[Tensor] | None:
        """Hidden states of all tokens but padding, behind the embeddings and behind each layer.

        Returns:
            Each [tokens, D] in at least float32; None of a reference that is not there.
        """
        if reference and not (isinstance(self.model, PeftModel) or self.reference):
            return None
        chosen = self.reference_model() if reference else nullcontext(self.language_model)
        with self._uncompiled(), chosen as model:
            return layer_states(model, batch)

    @contextmanager
    def reference_model(self) -> Iterator[PreTrainedModel]:
        """The reference: the adapter switched off, or the frozen copy.

        Raises:
            ValueError: there is neither.
        """
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.language_model
        elif self.reference is not None:
            yield self.reference
        else:
            raise ValueError("This model was loaded without a reference.")

    def _uncompiled(self) -> AbstractContextManager:
        """For what runs rarely or in a new shape every time, and is not worth compiling."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _check_once(self, layout: Layout) -> None:
        if layout not in self._checked:
            with self._uncompiled():
                self._check(layout)
            self._checked.add(layout)

    @abstractmethod
    def _check(self, layout: Layout) -> None:
        """Compare our way through the model with its own on a tiny made-up pair.

        Covers what no configuration tells: a head that does more than we do, or an attention that
        does not follow the mask. It runs inside the first forward pass, where a sharded model's
        head is whole.
        """

    def _states(self, batch: PairBatch, index: Tensor) -> Tensor:
        """:func:`hidden_states` of a made-up batch.

        Raises:
            InputError: the family cannot work on the layout at all.
        """
        model = self.language_model
        try:
            return hidden_states(model, batch, decoder_inputs(model, batch), index)
        except (AttributeError, KeyError, ValueError) as error:
            raise InputError(
                f"{model.config.model_type} cannot work on the {batch.layout} layout "
                f"({first_line(error)}): set data.layout to 'padded'."
            ) from error


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
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].to("cpu", dtype).to(torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16] + (f"-{quantize}" if quantize else "")
