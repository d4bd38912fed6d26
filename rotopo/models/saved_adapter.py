"""Adapters in folders: a model's settings, with an adapter's folder as its path -> its base, and
the adapter that goes on training or is merged into it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor

from rotopo.errors import InputError
from rotopo.models.moved_base import moves_base
from rotopo.models.settings import BackboneConfig
from rotopo.pretrained import adapter_settings, first_line, pretrained_folder

Config = TypeVar("Config", bound=BackboneConfig)

# What says nothing of what an adapter computes.
_BOOKKEEPING = (
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "task_type",
    "init_lora_weights",
)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that PEFT has written.

    Attributes:
        path: its folder, as it was set.
        base: path of its base model.
        config: its configuration, to train.
        weights: its tensors, by PEFT's names in files.
        setting: what messages call its path.
    """

    path: str
    base: str
    config: PeftConfig
    weights: dict[str, Tensor]
    setting: str

    @classmethod
    def at(cls, path: str, base_path: str | None, setting: str) -> Self | None:
        """The adapter at a path; None where there is another thing.

        Args:
            path: as of :func:`rotopo.pretrained.pretrained_folder`.
            base_path: its base, if the folder's word for it is not to be taken.
            setting: what messages call the path.

        Raises:
            InputError: an adapter that cannot be read, whose base is not named or is no model, or
                that belongs to a base which its initialisation has changed.
        """
        settings = adapter_settings(path)
        if settings is None:
            return None
        folder = pretrained_folder(path)
        try:
            config = PeftConfig.from_pretrained(folder)
            weights = load_peft_weights(folder, device="cpu")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{setting}: the adapter at {path!r} cannot be read: {first_line(error)}"
            ) from error
        base = base_path or settings.get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"{setting}: the adapter at {path!r} does not name its base model: set "
                f"{setting.removesuffix('path')}base_path."
            )
        if adapter_settings(base) is not None:
            raise InputError(
                f"{setting}: the base of the adapter at {path!r} is an adapter itself ({base!r}): "
                "export that one as a merged model first, and name it in "
                f"{setting.removesuffix('path')}base_path."
            )
        if moves_base(config):
            start: Any = config
            raise InputError(
                f"{setting}: the adapter at {path!r} belongs to a base that its initialisation "
                f"({start.init_lora_weights}) has changed: save it with PEFT's "
                "path_initial_model_for_weight_conversion, which makes it one for the base itself."
            )
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # its values come from the file
        config.inference_mode = False
        return cls(path, str(base), config, weights, setting)

    def load_into(self, model: PeftModel) -> None:
        """Give a model's adapter, put on by :attr:`config`, the values of the file.

        Raises:
            InputError: the file holds other tensors than the adapter has on this model.
        """
        expected: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        own = self.weights.keys() <= expected.keys()
        if own:  # by their names in the model, see rotopo.run.as_adapter
            expected = {n: t for n, t in expected.items() if t.requires_grad or n in self.weights}
        else:
            expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        wrong = expected.keys() ^ self.weights.keys()
        wrong |= {
            name
            for name in expected.keys() & self.weights.keys()
            if expected[name].shape != self.weights[name].shape
        }
        if wrong:
            raise InputError(
                f"{self.setting}: the adapter at {self.path!r} does not fit {self.base!r}: "
                f"{len(wrong)} of its tensors are others ({min(wrong)}, for one)."
            )
        if own:
            with torch.no_grad():
                for name, value in self.weights.items():
                    expected[name].copy_(value)
        else:
            set_peft_model_state_dict(model, self.weights)

    @property
    def fingerprint(self) -> str:
        """A short hash of its configuration and values."""
        return fingerprint_of(self.config, self.weights)


@dataclass(frozen=True)
class BaseModel:
    """Where a base model comes from.

    Attributes:
        path: its own, of an adapter's folder that of the adapter's base.
        merged: that of the adapter that was merged into it, if one was.
        goes_on: that of the adapter that went on training, if one did.
        reference: hash of the weights of another model that is the reference, if one is.
    """

    path: str
    merged: str | None = None
    goes_on: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Source(Generic[Config]):
    """Where a model comes from.

    Attributes:
        config: its settings, with its base's path, and its adapter's configuration if it has one.
        goes_on: the adapter that goes on training.
        merged: the one that is merged into the base.
    """

    config: Config
    goes_on: SavedAdapter | None = None
    merged: SavedAdapter | None = None

    def base(self, reference: str | None = None) -> BaseModel:
        """What a checkpoint says of it.

        Args:
            reference: see :class:`BaseModel`.
        """
        merged = None if self.merged is None else self.merged.path
        goes_on = None if self.goes_on is None else self.goes_on.path
        return BaseModel(self.config.path, merged, goes_on, reference)


def source_of(config: Config) -> Source[Config]:
    """What the settings of a model name.

    Raises:
        InputError: as of :meth:`SavedAdapter.at`, or a base path without an adapter, or an adapter
            to be merged into a base that is to be quantised.
    """
    name = f"{config.setting}.path"
    saved = SavedAdapter.at(config.path, config.base_path, name)
    if saved is None:
        if config.base_path is not None:
            raise InputError(
                f"{config.setting}.base_path is the base of an adapter, and {config.path!r} is "
                "none: leave it out."
            )
        return Source(config)
    base = replace(config, path=saved.base, base_path=None)
    if config.adapter is None:
        return Source(replace(base, adapter=saved.config), goes_on=saved)
    if config.quantize is not None:
        raise InputError(
            f"{name} is an adapter, which under {config.setting}.adapter is merged into its base, "
            f"and a quantised base ({config.setting}.quantize) would round it: export it as a "
            f"merged model and name that, or leave {config.setting}.adapter out to train it on."
        )
    return Source(base, merged=saved)


def fingerprint_of(config: PeftConfig, tensors: Mapping[str, Tensor]) -> str:
    """A short hash of an adapter: what its configuration says of the function, and its values."""
    # What is left at its default does not count: another release of PEFT may have more fields.
    usual = {f.name: f.default for f in fields(config)}
    said = {
        k: v
        for k, v in config.to_dict().items()
        if k not in _BOOKKEEPING and "dropout" not in k and v not in (None, {}, [], usual.get(k))
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=_plain).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
