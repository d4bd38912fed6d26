"""Hugging Face models and tokenizers by name, folder, GGUF file or package resource."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rotopo.data.sources import cache_dir, resource_path
from rotopo.errors import InputError

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]


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


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; see :func:`load_model` for what ``path`` may be.

    Raises:
        InputError: nothing is there, or it holds no tokenizer.
    """
    folder = _hugging_face_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"No tokenizer at {path!r}: {_first_line(error)}") from error


def load_config(path: str) -> PretrainedConfig:
    """The configuration of the model at ``path``, with every dropout of the base set to zero.

    Dropout in the base would make policy and reference differ before training; an adapter's own
    dropout is left alone.
    """
    folder = _hugging_face_folder(path)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No model at {path!r}: give policy.path a model's name on the Hub, a folder, a GGUF "
            f"file, or package:PACKAGE/FILE. ({_first_line(error)})"
        ) from error
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_model(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A causal language model.

    Args:
        path: a name on the Hub, a folder that ``save_pretrained`` wrote, a GGUF file, or
            ``package:PACKAGE/FILE`` for either inside an installed Python package. A GGUF file
            is converted once and kept in the cache folder.
        dtype: dtype of the weights.
        attention: the attention implementation, as transformers names it.

    Raises:
        InputError: no such model, or it has no such attention.
    """
    config = load_config(path)
    try:
        return AutoModelForCausalLM.from_pretrained(
            _hugging_face_folder(path), config=config, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"Cannot load the model {path!r}: {_first_line(error)}") from error


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _hugging_face_folder(path: str) -> str:
    """What ``from_pretrained`` takes: GGUF files converted, package resources resolved."""
    resolved = str(resource_path(path)) if path.startswith("package:") else path
    if resolved.endswith(".gguf"):
        return str(_convert_gguf(Path(resolved)))
    looks_local = resolved.startswith(("/", ".", "~")) or resolved.count("/") > 1
    if looks_local and not Path(resolved).expanduser().exists():
        raise InputError(f"policy.path: there is no file or folder {path!r}.")
    return os.path.expanduser(resolved)


def _convert_gguf(file: Path) -> Path:
    """Dequantise a GGUF file into a Hugging Face folder of float32 weights, once."""
    if not file.is_file():
        raise InputError(f"policy.path: there is no GGUF file {str(file)!r}.")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    folder = cache_dir() / "models" / f"{file.stem}-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise InputError(
            f"Reading {file.name} takes the gguf package: pip install 'rotopo[quickstart]'."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"Cannot read the GGUF file {file}: {_first_line(error)}") from error
    del model.config.quantization_config
    # A folder appears under its name only when it is whole; of two processes one wins.
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
