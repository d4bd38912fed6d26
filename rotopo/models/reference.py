"""The reference of a policy where it is a model of its own; and whether the policy starts at it."""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from rotopo.errors import InputError
from rotopo.models.loading import adapt, fingerprint, load_as_set, load_model
from rotopo.models.log_probs import PairLogProbs
from rotopo.models.mixed_precision import narrowed
from rotopo.models.reference_cache import ReferenceCache
from rotopo.models.saved_adapter import fingerprint_of, source_of
from rotopo.models.settings import PolicyConfig, ReferenceMode
from rotopo.models.sharding import Sharding
from rotopo.pretrained import load_tokenizer, with_tokenizer


class OtherReference:
    """What ``policy.reference_path`` names: a model, or an adapter on one.

    Args:
        config: the policy's settings.
        dtype: of its weights. They are not quantised.
        sharding: how it is to be divided among ranks.

    Attributes:
        weights: hash of its weights, its adapter's included, once it has been loaded.
        fingerprint: of all that its log-probs follow from, likewise.
        adapter: ids of its adapter's parameters, which keep their dtype.
    """

    def __init__(
        self, config: PolicyConfig, dtype: torch.dtype, sharding: Sharding | None = None
    ) -> None:
        assert config.reference_path is not None
        self._dtype = dtype
        self._sharding = sharding
        own = replace(
            config,
            path=config.reference_path,
            base_path=None,
            adapter=None,
            compute_dtype=None,
            quantize=None,
            activation_checkpointing=False,
        )
        with _by_its_name():
            self._source = source_of(own)
        _refuse_other_tokens(config)
        self.weights = self.fingerprint = ""
        self.adapter: set[int] = set()

    def load(self) -> PreTrainedModel:
        """The model, frozen.

        Raises:
            InputError: as for a policy, under the name ``policy.reference_path``.
        """
        config, dtype, goes_on = self._source.config, self._dtype, self._source.goes_on
        with _by_its_name():
            model, _, _ = load_as_set(load_model, config, self._sharding, dtype)
            weights = self.weights = fingerprint(model, dtype)
            own = {id(p) for p in model.parameters()}
            head = model.get_output_embeddings()
            adapted, _ = adapt(model, config, head, goes_on)
        adapted.requires_grad_(False).eval()
        if config.adapter is not None and goes_on is not None:
            added = {n: p for n, p in model.named_parameters() if id(p) not in own}
            self.adapter = {id(p) for p in added.values()}
            weights += f" {fingerprint_of(config.adapter, added)}"
            self.weights += f"+{goes_on.fingerprint}"  # which no dtype changes
        self.fingerprint = fingerprint_of_reference(model, weights, dtype)
        return model


def fingerprint_of_reference(model: PreTrainedModel, weights: str, dtype: torch.dtype) -> str:
    """Hash of all that a reference's log-probs follow from.

    Args:
        model: whose configuration counts.
        weights: hash of them all.
        dtype: what it computes in.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        config.pop(name, None)
    parts = [weights, str(dtype), json.dumps(config, sort_keys=True, default=str)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def refuse_modes(config: PolicyConfig) -> None:
    """Refuse settings of the reference that do not go together.

    Raises:
        InputError: a mode that there is not, or a folder for a cache that is not used.
    """
    if config.reference not in get_args(ReferenceMode):
        raise InputError(
            f"policy.reference is {config.reference!r}: it has to be one of "
            f"{', '.join(get_args(ReferenceMode))}."
        )
    if config.reference_cache and config.reference == "online":
        raise InputError(
            "policy.reference_cache is set, but policy.reference is 'online' and uses none: "
            "set it to 'cached' or 'auto'."
        )


def reference_for(
    model: PreTrainedModel,
    config: PolicyConfig,
    dtype: torch.dtype | None,
    narrow: torch.dtype | None,
    sharding: Sharding | None,
) -> tuple[PreTrainedModel | None, OtherReference | None]:
    """The reference of a policy that has one of its own, and what it is of where settings name it:
    a copy of a model whose every weight trains. Else it follows from the adapter.

    Args:
        model: the policy's, before the first step.
        config: its settings.
        dtype: of another model's weights; None takes the policy's.
        narrow: of a copy's weights; None leaves them.
        sharding: how it is to be divided among ranks.
    """
    if config.reference_path is not None and model.device.type != "meta":
        other = OtherReference(config, dtype or model.dtype, sharding)
        return other.load(), other
    if config.adapter is not None and config.reference_path is None:
        return None, None
    weights: dict[int, nn.Parameter] = {}
    if sharding is not None:  # share them, as two models that are mapped to one file do
        weights = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    elif narrow is not None:
        weights = narrowed(model, narrow)
    reference = copy.deepcopy(model, weights)
    reference.requires_grad_(False).eval()
    return reference, None


def refuse_other_start(found: PairLogProbs, rounding: float, cache: ReferenceCache | None) -> None:
    """Compare a policy before its first step with its reference, which are one model.

    Computed side by side they are equal, as a rule to the last bit; a device may round what an
    adapter adds, and cached values come from batches of other rows.

    Args:
        found: their log-probs of some rows.
        rounding: what a log-prob may differ by, as a share of its size.
        cache: where the reference's come from, if they do.

    Raises:
        InputError: they are not one model.
    """
    ratios = found.chosen_log_ratio.abs() + found.rejected_log_ratio.abs()
    size = found.chosen.abs() + found.rejected.abs()
    tokens = (found.chosen_length + found.rejected_length).sum()
    if not ratios.sum() <= rounding * size.sum():
        advice = "they should be one model there: please report this"
        if cache is not None:
            advice = (
                f"the values in {cache.folder} are not this model's: remove that folder, and they "
                "are computed again"
            )
        raise InputError(
            "policy.reference: before the first step, policy and reference differ by "
            f"{ratios.sum() / tokens:.3g} nats a token; {advice}."
        )
    if cache is None and ratios.any():
        rank_zero_info(
            "Before the first step, policy and reference differ by rounding: "
            f"{ratios.sum() / tokens:.1e} nats a token."
        )


@contextmanager
def _by_its_name() -> Iterator[None]:
    """Messages under the name of its own setting."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for other in ("The model's path", "policy.path"):
            message = message.replace(other, "policy.reference_path")
        advice = "set policy.base_path", "name it in the folder's adapter_config.json"
        raise InputError(message.replace(*advice)) from error


def _refuse_other_tokens(config: PolicyConfig) -> None:
    """Refuse a reference whose tokenizer gives other numbers to tokens."""
    vocabularies = []
    for path in (with_tokenizer(config.path, config.base_path), config.reference_path or ""):
        try:
            vocabularies.append(load_tokenizer(path).get_vocab())
        except InputError:  # weights alone: nothing to compare
            return
    own, other = vocabularies
    different = sum(own.get(token) != other.get(token) for token in own | other)
    if different:
        raise InputError(
            f"policy.reference_path: {config.reference_path!r} has another tokenizer than the "
            f"policy ({different} tokens differ): its log-probs would be of other texts."
        )
