"""Policy: a batch of pairs -> their log-probs, under θ and under the reference; generation."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotopo.data.batch import Layout, PairBatch, PromptBatch, Role, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.backbone import (
    Backbone,
    decoder_inputs,
    hidden_states,
    rounding,
    tensors,
)
from rotopo.models.beside import embeddings
from rotopo.models.generation import respond
from rotopo.models.head import Head, token_kls, token_log_probs
from rotopo.models.loading import adapt, fingerprint, load_as_set, load_model
from rotopo.models.log_probs import PairLogProbs, pair_log_probs, tokens_with_kl
from rotopo.models.merging import folded, merge
from rotopo.models.mixed_precision import compute_dtype, in_compute_dtype, kept_wide
from rotopo.models.modes import evaluating
from rotopo.models.reference import (
    OtherReference,
    fingerprint_of_reference,
    reference_for,
    refuse_modes,
    refuse_other_start,
)
from rotopo.models.reference_cache import ReferenceCache
from rotopo.models.router import RouterLoss
from rotopo.models.saved_adapter import Source, fingerprint_of, source_of
from rotopo.models.settings import PolicyConfig, Sampling
from rotopo.models.sharding import Sharding
from rotopo.models.starting import refuse_trained_base, starts_as_identity
from rotopo.pretrained import cache_dir, positions_of

# Of the reference's log-probs: what a run that dies loses at most.
_BATCHES_PER_FILE = 200


class Policy(Backbone):
    """A causal language model with what preference objectives ask of it.

    Args:
        model: the model, with or without a PEFT adapter.
        reference: another model as the reference, or a frozen copy of one without an adapter;
            None lets it follow from the adapter, see :meth:`.Backbone.reference_model`.
        base_fingerprint: hash of the base model's weights, see
            :func:`rotopo.models.loading.fingerprint`.

    Attributes:
        other_reference: what the reference is if the settings name one.
        starts_at_reference: whether policy and reference are still one model, which a fit checks
            before its first step: for whoever gives the policy other weights to set to false.

    Raises:
        InputError: an adapter on the output head.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | None = None,
        base_fingerprint: str = "",
    ) -> None:
        super().__init__(model, base_fingerprint, reference)
        self.cache: ReferenceCache | None = None
        self.other_reference: OtherReference | None = None
        self.starts_at_reference = True
        head = self.language_model.get_output_embeddings()
        if not hasattr(head, "weight") or hasattr(head, "base_layer"):
            raise InputError(
                "policy.adapter: an adapter on the output head is not supported, because the "
                "head is applied in tiles; leave it out of target_modules."
            )

    @classmethod
    def load(
        cls,
        config: PolicyConfig,
        needs_reference: bool,
        sharding: Sharding | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a model, put its adapter on it, and divide it.

        Args:
            config: which model, and what is trained of it.
            needs_reference: keep a frozen copy for the reference if there is no adapter.
            sharding: how to divide it among ranks; None leaves it whole.
            dtype: of the weights instead of the configuration's, by which the base is still known.

        Raises:
            InputError: a path, dtype, attention or adapter that does not work, by its setting.
        """
        source = source_of(config)
        model, trained, known_by = load_as_set(
            load_model, source.config, sharding, dtype, merges=source.merged is not None
        )
        return cls.build(model, config, needs_reference, trained, sharding, known_by, source)

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        config: PolicyConfig,
        needs_reference: bool,
        dtype: torch.dtype | None = None,
        sharding: Sharding | None = None,
        known_by: PreTrainedModel | None = None,
        source: Source[PolicyConfig] | None = None,
    ) -> Self:
        """As :meth:`load`, from a model in memory, to be converted to a dtype as it is divided;
        known by another one if it is quantised; and with what its path has said of its adapter."""
        refuse_modes(config)
        source = source or Source(config)
        config, merged = source.config, source.merged
        base = fingerprint(known_by or model, dtype, config.quantize)
        wide: set[int] = set()
        if merged is not None:
            base += f"+{merged.fingerprint}"
            wide = merge(model, merged, config.setting, dtype or model.dtype)
        # By their ids: who held the parameters would keep whole what is divided.
        own = {id(p): None if id(p) in wide else dtype for p in model.parameters()}
        buffers = {id(buffer) for buffer in model.buffers()}
        narrow = compute_dtype(config)
        adapted, originals = adapt(model, config, model.get_output_embeddings(), source.goes_on)
        identity = True
        if config.adapter is not None:
            refuse_trained_base(adapted, own, config)
            identity = not (source.goes_on or originals) and starts_as_identity(
                adapted, f"{config.setting}.adapter"
            )
        added = [n for n, t in tensors(model) if id(t) not in own.keys() | buffers]
        reference, other = None, None
        if needs_reference:
            reference, other = reference_for(model, config, narrow or dtype, narrow, sharding)
        if reference is not None:
            adapter = set() if other is None else other.adapter
            own |= {id(p): narrow or dtype for p in reference.parameters() if id(p) not in adapter}
        policy = cls(adapted.train(), reference, base)
        policy.other_reference = other
        policy.starts_at_reference = other is None
        policy.router = RouterLoss.of(model, config)
        policy.base = source.base(None if other is None else other.weights)
        apart: list[nn.Module] = []
        if narrow is not None:
            apart = kept_wide(model)
            policy.compute_in(narrow, apart, sharding is not None)
            apart = apart + ([] if reference is None else kept_wide(reference))
            own |= {id(p): dtype for module in apart for p in module.parameters(recurse=False)}
        if config.compile is True:
            policy.compile_layers(config.setting)
        if sharding is not None:
            assert dtype is not None
            policy.divide(own, dtype, sharding, apart)
        policy.remember_start(added, identity, originals, config.setting)
        return policy

    @in_compute_dtype
    def forward(
        self,
        batch: PairBatch,
        needs: Needs = Needs(),  # noqa: B008
        compared: bool = False,
    ) -> PairLogProbs:
        """Log-probs of every row's responses.

        Args:
            batch: B rows.
            needs: what beside the policy's log-probs; under the reference there is no gradient.
            compared: compare the policy with its reference too, whatever is needed: log-probs of
                both, side by side and not from a cache, and both KLs of each token's distribution
                where they have one vocabulary. Without gradient.
        """
        self._check_once(batch.layout)
        reference, reference_log_probs = None, None
        if needs.reference and self.cache is not None and not compared:
            reference_log_probs = self.cache.get(batch.keys)
        if reference_log_probs is not None:
            reference_log_probs = reference_log_probs.to(batch.targets.device, non_blocking=True)
        inputs = decoder_inputs(self.language_model, batch)
        if (needs.reference or compared) and reference_log_probs is None:
            with torch.no_grad(), self.reference_model() as model:
                states = hidden_states(model, batch, inputs, batch.predictors)
                reference = states, _head(model).detached()
                reference_log_probs = token_log_probs(*reference, batch.targets).log_prob
        states = self.trained_states(batch, inputs, batch.predictors)
        head = _head(self.language_model)
        if compared and reference is not None and len(head.weight) == len(reference[1].weight):
            tokens = token_log_probs(states, head, batch.targets, moments=needs.moments)
            forward, reverse = token_kls(states, head, *reference)
            tokens = replace(tokens, kl=forward, reverse_kl=reverse)
        elif Role.REFERENCE_SAMPLE in needs.roles:
            assert reference is not None, "a KL needs the reference itself, not a cache"
            tokens = tokens_with_kl(batch, states, head, reference, needs.moments)
        else:
            tokens = token_log_probs(states, head, batch.targets, moments=needs.moments)
        return pair_log_probs(batch, tokens, reference_log_probs, needs.roles)

    @torch.no_grad()
    @in_compute_dtype
    def logits(self, batch: PairBatch, index: Tensor) -> Tensor:
        """Logits of what follows the tokens at a flat index [N] -> [N, V], in float32 at least."""
        self._check_once(batch.layout)
        model = self.language_model
        return _head(model).logits(hidden_states(model, batch, decoder_inputs(model, batch), index))

    @property
    def reference_fingerprint(self) -> str:
        """Hash of all that the reference's log-probs follow from: weights, dtype, configuration.
        All ranks together."""
        if self.other_reference is not None:
            return self.other_reference.fingerprint
        weights = self.base_fingerprint
        if self.start is not None:
            start = self.starting_adapter()
            config = cast(PeftModel, self.model).active_peft_config
            weights += f" {fingerprint_of(config, start['trained'] | start['fixed'])}"
        return fingerprint_of_reference(self.language_model, weights, self.compute_dtype)

    @contextmanager
    def reference_model(self) -> Iterator[PreTrainedModel]:
        if self.reference is None and self.other_reference is not None:
            self.reference = self.other_reference.load()
            nn.Module.to(self.reference, self.device)
        with super().reference_model() as model:
            yield model

    @property
    def has_reference(self) -> bool:
        return super().has_reference or self.other_reference is not None

    def start_as(self, saved: Mapping[str, dict[str, Tensor]] | None) -> None:
        self.starts_at_reference = False  # of a checkpoint it has moved
        super().start_as(saved)

    def let_go_of_reference(self) -> None:
        """Free the memory of a reference that is another model, which will be loaded again where
        something asks for it; one that is divided among ranks stays."""
        if self.other_reference is not None and self.sharding is None:
            self.reference = None

    @torch.no_grad()
    def check_start(self, batch: PairBatch, needs: Needs) -> None:
        """Check on some rows, once and before the first step, that the policy is its reference.

        Raises:
            InputError: it is not.
        """
        self.starts_at_reference = False
        if not needs.reference:
            return
        with evaluating(self.model), self._uncompiled():
            found = self(batch, replace(needs, roles=()))
        cached = self.cache is not None and self.cache.get(batch.keys) is not None
        weight = embeddings(self.language_model)
        share = max(1e-4 if cached else 1e-5, 4 * rounding(self.language_model, weight))
        refuse_other_start(found, share, self.cache if cached else None)

    def open_cache(self, folder: str | None = None, precision: str = "") -> ReferenceCache:
        """The reference's log-probs on disk, which :meth:`forward` reads from then on.

        Args:
            folder: where; None is the model's own in the cache folder.
            precision: what the Trainer casts to, if it casts.

        Raises:
            InputError: the folder belongs to another model, or a file in it cannot be read.
        """
        reference = self.reference_fingerprint + (f"-{precision}" if precision else "")
        path = Path(folder).expanduser() if folder else cache_dir() / "reference" / reference
        wide = embeddings(self.language_model).dtype == torch.float64
        self.cache = ReferenceCache(path, reference, torch.float64 if wide else torch.float32)
        return self.cache

    @torch.no_grad()
    @in_compute_dtype
    def cache_reference(self, batches: Iterable[PairBatch]) -> None:
        """Compute the reference's log-probs of these batches, and keep them in the cache."""
        assert self.cache is not None
        with self.reference_model() as model:
            for number, batch in enumerate(batches, 1):
                self._check_once(batch.layout)
                here = batch.to(self.device)
                inputs = decoder_inputs(model, here)
                states = hidden_states(model, here, inputs, here.predictors)
                log_probs = token_log_probs(states, _head(model), here.targets).log_prob
                self.cache.add(batch.keys, batch.lengths.tolist(), log_probs)
                if number % _BATCHES_PER_FILE == 0:
                    self.cache.flush()
        self.cache.flush()

    @torch.no_grad()
    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        stop_ids: list[int],
        reference: bool = False,
    ) -> list[list[int]]:
        """Response token ids for each prompt, without the stop token.

        Args:
            prompts: B left-padded prompts; equal ones are read once.
            sampling: how to choose tokens.
            stop_ids: tokens that end a response.
            reference: generate with the reference instead of the policy.

        Raises:
            InputError: the model has too few positions for the prompts and as many new tokens, or a
                logit is not finite.
        """
        limit = positions_of(self.language_model.config.get_text_config())
        T = prompts.input_ids.shape[1]
        if limit is not None and limit.end and T + sampling.max_new_tokens - 1 > limit.count:
            raise InputError(
                f"a prompt of {T} tokens and {sampling.max_new_tokens} new ones (max_new_tokens) "
                f"are more than the model's {limit.count} positions: lower max_new_tokens, or "
                "data.max_length, which bounds the prompts."
            )
        # The layers' copies too: they are made once rather than for every token.
        copies = nullcontext() if self.masters is None else self.masters.replaced(layers=True)
        chosen = self.reference_model() if reference else nullcontext(self.language_model)
        divided = self.sharding is not None and self.sharding.mesh.size() > 1
        with chosen as model, evaluating(model), self._uncompiled(), copies, folded(model):
            return respond(model, prompts, sampling, stop_ids, together=divided)

    @torch.no_grad()
    def _check(self, layout: Layout) -> None:
        model = self.language_model
        weight = embeddings(model)
        ids = [i % weight.shape[0] for i in range(7, 31)]
        row = TokenizedRow(ids[:10], [ids[10:18], ids[18:]], [Role.CHOSEN, Role.REJECTED], 0)
        batch = collate([row], pad_id=0, layout=layout, loss_scale=1.0).to(weight.device)
        expected = []
        with evaluating(model):
            for response in row.responses:
                tokens = torch.tensor([row.prompt + response], device=weight.device)
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                logits = logits[len(row.prompt) - 1 : -1]
                log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                expected.append(log_p.gather(1, tokens[0, len(row.prompt) :, None]).squeeze(1))
            states = self._states(batch, batch.predictors)
            found = token_log_probs(states, _head(model), batch.targets).log_prob
        difference = (found - torch.cat(expected)).abs().mean()
        if not torch.cat(expected).isfinite().all():
            raise InputError(
                f"{model.config.model_type}: its log-probs are not finite: the model has diverged."
            )
        # Rounding in a half type moves a log-prob by about a hundredth of its size.
        relative = max(1e-4, 4 * rounding(model, states))
        if not difference <= relative * torch.cat(expected).abs().mean():
            raise InputError(
                f"{model.config.model_type}: log-probs in the {layout} layout differ from the "
                f"model's own by {difference:.3g} nats a token: this family is not supported. "
                + (
                    "Set data.layout to 'padded'."
                    if layout != "padded"
                    else "Its output head seems to do more than multiply."
                )
            )


def _head(model: PreTrainedModel) -> Head:
    """The output head, with what families do to its logits.

    Where an adapter trains it, or rows of it: what trains, or the original while it is off.
    """
    module = cast(nn.Linear, model.get_output_embeddings())
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, getattr(module, "bias", None), scale, softcap)
