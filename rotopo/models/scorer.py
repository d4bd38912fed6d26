"""Scorer: a batch of pairs -> the reward of each response, by a scalar head on a language model."""

import copy
import dataclasses
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging

from rotopo.data.batch import Layout, PairBatch, Role, TokenizedRow, collate
from rotopo.errors import InputError
from rotopo.models.backbone import Backbone, decoder_inputs, rounding, tensors
from rotopo.models.beside import embeddings
from rotopo.models.loading import adapt, fingerprint, load_as_set, load_config
from rotopo.models.merging import merge
from rotopo.models.mixed_precision import compute_dtype, in_compute_dtype, kept_wide
from rotopo.models.modes import evaluating
from rotopo.models.router import RouterLoss
from rotopo.models.saved_adapter import Source, source_of
from rotopo.models.settings import BackboneConfig
from rotopo.models.sharding import Sharding, gathered
from rotopo.pretrained import conversion_advice, first_line, pretrained_folder


class Scorer(Backbone):
    """A reward model: a decoder with a head of one output, read at a response's last token.

    Inside is a model of transformers' ``AutoModelForSequenceClassification`` with one label: made
    from a causal language model, whose new head is drawn as transformers draws it (normal, with
    the configuration's ``initializer_range``), by the run's seed; or loaded with the head that
    somebody has trained. The head is at least float32, whatever the decoder's dtype, and trains
    beside any adapter.

    The reward is read at the hidden state of the response's last token, the end of turn, which a
    batch has only if a further token follows that is never read (``Needs.ends``).

    Args:
        model: the model, with or without a PEFT adapter.
        base_fingerprint: hash of the decoder's weights as loaded; the head is in checkpoints.
    """

    @classmethod
    def load(
        cls,
        config: BackboneConfig,
        sharding: Sharding | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a model, put its adapter on it, and divide it.

        Args:
            config: which model, and what is trained of it.
            sharding: how to divide it among ranks; None leaves it whole.
            dtype: of the weights instead of the configuration's, by which the base is still known.

        Raises:
            InputError: a path, dtype, attention or adapter that does not work, by its setting; a
                model that has no such head, or one with several outputs.
        """
        source = source_of(config)
        model, trained, known_by = load_as_set(
            _load_model, source.config, sharding, dtype, merges=source.merged is not None
        )
        return cls.build(model, config, trained, sharding, known_by, source)

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        config: BackboneConfig,
        dtype: torch.dtype | None = None,
        sharding: Sharding | None = None,
        known_by: PreTrainedModel | None = None,
        source: Source[BackboneConfig] | None = None,
    ) -> Self:
        """As :meth:`load`, from a model in memory, to be converted to a dtype as it is divided;
        known by another one if it is quantised; and with what its path has said of its adapter."""
        source = source or Source(config)
        config, merged = source.config, source.merged
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise InputError(
                f"backbone.path: {type(model).__name__} has no score head on a decoder; only "
                "decoders are supported, encoders (BERT, DeBERTa, ...) are not."
            )
        if head.out_features != 1:
            raise InputError(
                f"backbone.path: the model's head has {head.out_features} outputs, and a reward "
                "is one: take another model."
            )
        base = fingerprint((known_by or model).base_model, dtype, config.quantize)
        wide: set[int] = set()
        if merged is not None:
            base += f"+{merged.fingerprint}"
            wide = merge(model, merged, config.setting, dtype or model.dtype)
        own = {id(p): None if id(p) in wide else dtype for p in model.base_model.parameters()}
        here = {id(tensor) for _, tensor in tensors(model)}
        head.to(torch.promote_types(head.weight.dtype, torch.float32))
        head.register_forward_pre_hook(_cast_to_head)
        if config.adapter is not None:
            adapter = copy.deepcopy(config.adapter)
            # For a task PEFT would wrap model and head in its own way.
            adapter.task_type = None
            config = dataclasses.replace(config, adapter=adapter)
        adapted, originals = adapt(model, config, head, source.goes_on)
        added = [name for name, tensor in tensors(model) if id(tensor) not in here]
        if model.score is not head:
            raise InputError(
                "backbone.adapter: an adapter on the score head is not supported, which trains "
                "whole anyway; leave it out of target_modules and modules_to_save."
            )
        head.requires_grad_(True)
        scorer = cls(adapted.train(), base)
        scorer.router = RouterLoss.of(model, config)
        scorer.base = source.base()
        narrow = compute_dtype(config)
        apart: list[nn.Module] = []
        if narrow is not None:
            apart = [head, *kept_wide(model)]
            scorer.compute_in(narrow, apart, sharding is not None)
        if config.compile is True:
            scorer.compile_layers(config.setting)
        if sharding is not None:
            assert dtype is not None
            scorer.divide(own, dtype, sharding, apart)
        # Nothing refers to how it started but a base that it was taken out of.
        scorer.remember_start(added, not originals, originals, config.setting)
        return scorer

    @in_compute_dtype
    def forward(self, batch: PairBatch) -> Tensor:
        """The reward of every response [S], in float32 at least.

        Args:
            batch: B rows of S responses, with a token behind each that is never read.
        """
        self._check_once(batch.layout)
        model: Any = self.language_model
        inputs = decoder_inputs(model, batch)
        states = self.trained_states(batch, inputs, _last_tokens(batch))
        with torch.autocast(states.device.type, enabled=False):  # a half type would round rewards
            return model.score(states).squeeze(1)

    @torch.no_grad()
    def _check(self, layout: Layout) -> None:
        model: Any = self.language_model
        weight = embeddings(model)
        pad = model.config.get_text_config().pad_token_id
        # The model itself reads behind the last token that is no padding.
        ids = [i for i in range(7, 64) if i % weight.shape[0] != pad][:24]
        ids = [i % weight.shape[0] for i in ids]
        row = TokenizedRow(ids[:10], [ids[10:18], ids[17:]], [Role.CHOSEN, Role.REJECTED], 0)
        batch = collate([row], pad_id=0, layout=layout, loss_scale=1.0).to(weight.device)
        tokens = [
            torch.tensor([row.prompt + response[:-1]], device=weight.device)
            for response in row.responses
        ]
        with evaluating(model):
            expected = torch.cat(
                [model(input_ids=ids, use_cache=False).logits[0] for ids in tokens]
            )
            states = self._states(batch, _last_tokens(batch))
            found = model.score(states).squeeze(1)
        # A reward may be near zero: rounding is a share of what it is the sum of, for directions
        # that have nothing to do with one another.
        weight = gathered(model.score.weight).float()  # which may be a unit of its own
        size = states.float().norm(dim=1) * weight.norm() / len(states[0]) ** 0.5
        tolerance = max(1e-4, 16 * rounding(model, states)) * size.mean()
        difference = (found - expected).abs().mean()
        if not expected.isfinite().all():
            raise InputError(
                f"{model.config.model_type}: its rewards are not finite: the model has diverged."
            )
        if not difference <= tolerance:
            raise InputError(
                f"{model.config.model_type}: rewards in the {layout} layout differ from the "
                f"model's own by {difference:.3g}: this family is not supported. "
                + (
                    "Set data.layout to 'padded'."
                    if layout != "padded"
                    else "It seems to be no decoder, or its head does more than multiply."
                )
            )


def _load_model(
    path: str,
    dtype: torch.dtype | None,
    attention: str,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """A sequence classifier of one label, with a new head if the model at ``path`` has none.

    Arguments as of :func:`rotopo.models.loading.load_model`.

    Raises:
        InputError: no such model or attention, or one with another head or missing weights.
    """
    config = load_config(path, "backbone", trust_remote_code)
    trained = any("SequenceClassification" in name for name in config.architectures or ())
    if trained and config.num_labels != 1:
        raise InputError(
            f"backbone.path: {path!r} tells {config.num_labels} classes apart, and a reward is one "
            "number: take another model."
        )
    config.num_labels = 1
    if dtype is None:
        config.dtype = None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the new head, which is what we want
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            pretrained_folder(path),
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **settings,
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(
            f"Cannot load backbone.path {path!r} with backbone.attention {attention!r}: "
            f"{first_line(error)}{conversion_advice(path)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    new = set(report["missing_keys"])
    if (trained and new) or new - {"score.weight"}:
        raise InputError(
            f"backbone.path: {path!r} lacks weights of {type(model).__name__} ({min(new)}, for "
            "one): only decoders are supported, whole."
        )
    if new:
        text = config.get_text_config()
        std = getattr(text, "initializer_range", None) or text.init_std  # OPT's name of it
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        weight = cast(Tensor, model.score.weight)
        noise = torch.randn(weight.shape, generator=generator, device="cpu")
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        model.score.weight = nn.Parameter((std * noise).to(weight.device, wide))
    return model


def _last_tokens(batch: PairBatch) -> Tensor:
    """Flat index of each response's last token but one, behind which none is an input [S]."""
    return batch.predictors[batch.lengths.cumsum(0) - 1]


def _cast_to_head(head: nn.Linear, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].to(head.weight.dtype),)
