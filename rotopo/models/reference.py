"""The reference of a policy where it is a model of its own; and whether the policy starts at it."""

import copy
import hashlib
import json
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotopo.errors import InputError
from rotopo.models.loading import adapt, fingerprint, load_as_set, load_model
from rotopo.models.mixed_precision import narrowed
from rotopo.models.saved_adapter import fingerprint_of, source_of
from rotopo.models.settings import PolicyConfig
from rotopo.models.sharding import Sharding
from rotopo.pretrained import load_tokenizer


class OtherReference:
    """What ``policy.reference_path`` names: a model, or an adapter on one.

    Args:
        config: the policy's settings.
        dtype: of its weights. They are not quantised.
        sharding: how it is to be divided among ranks.

    Attributes:
        fingerprint: of its weights, its adapter's included, once it has been loaded.
        adapter: ids of its adapter's parameters, which keep their dtype.
    """

    def __init__(
        self, config: PolicyConfig, dtype: torch.dtype, sharding: Sharding | None = None
    ) -> None:
        assert config.reference_path is not None
        self._dtype = dtype
        self._sharding = sharding
        self._source = source_of(
            replace(
                config,
                path=config.reference_path,
                base_path=None,
                adapter=None,
                compute_dtype=None,
                quantize=None,
                activation_checkpointing=False,
            )
        )
        _refuse_other_tokens(config)
        self.fingerprint = ""
        self.adapter: set[int] = set()

    def load(self) -> PreTrainedModel:
        """The model, frozen.

        Raises:
            InputError: as for a policy, under the name ``policy.reference_path``.
        """
        config, dtype = self._source.config, self._dtype
        try:
            model, _, _ = load_as_set(load_model, config, self._sharding, dtype)
            base = fingerprint(model, dtype)
            own = {id(p) for p in model.parameters()}
            head = model.get_output_embeddings()
            adapted, _ = adapt(model, config, head, self._source.goes_on)
        except InputError as error:
            message = str(error).replace("policy.path", "policy.reference_path")
            raise InputError(message) from error
        adapted.requires_grad_(False).eval()
        if config.adapter is not None:
            added = {n: p for n, p in model.named_parameters() if id(p) not in own}
            self.adapter = {id(p) for p in added.values()}
            base += f" {fingerprint_of(config.adapter, added)}"
        self.fingerprint = fingerprint_of_reference(model, base, dtype)
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


def frozen_copy(
    model: PreTrainedModel, sharing: bool, dtype: torch.dtype | None
) -> PreTrainedModel:
    """A model as it is now.

    Args:
        model: without an adapter.
        sharing: share its weights, as two that are mapped to one file do.
        dtype: of the copy's weights; None leaves them.
    """
    weights: dict[int, nn.Parameter] = {}
    if sharing:
        weights = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    elif dtype is not None:
        weights = narrowed(model, dtype)
    reference = copy.deepcopy(model, weights)
    reference.requires_grad_(False).eval()
    return reference


def refuse_other_start(
    policy: Tensor, reference: Tensor, tokens: Tensor, rounding: float, cache: str | None
) -> None:
    """Compare a policy before its first step with its reference, which are one model.

    Args:
        policy: log-probs of some responses [S].
        reference: the same under the reference [S].
        tokens: of each response [S].
        rounding: what a log-prob may differ by as a share of its size, where they were not computed
            side by side.
        cache: the folder that the reference's come from, if they do.

    Raises:
        InputError: they are not one model.
    """
    difference = (policy - reference).abs().sum() / tokens.sum()
    if not difference <= rounding * policy.abs().sum() / tokens.sum():
        advice = "policy and reference should be one model there: please report this"
        if cache is not None:
            advice = (
                f"the values in {cache} are not this model's: remove that folder, and they are "
                "computed again"
            )
        raise InputError(
            f"policy.reference: before the first step, policy and reference differ by "
            f"{difference:.3g} nats a token; {advice}."
        )


def _refuse_other_tokens(config: PolicyConfig) -> None:
    """Refuse a reference whose tokenizer gives other numbers to tokens."""
    vocabularies = []
    for path in (config.path, config.reference_path or ""):
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
