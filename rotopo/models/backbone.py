"""The decoder inside policies and reward models: hidden states, with and without the adapter."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotopo import ranks
from rotopo.data.batch import Layout, PairBatch
from rotopo.errors import InputError
from rotopo.models.attention import AttentionInputs, attention_inputs
from rotopo.models.beside import copies, embeddings
from rotopo.models.compilation import compile_layers
from rotopo.models.mixed_precision import Masters, in_compute_dtype
from rotopo.models.moved_base import move_to_start
from rotopo.models.router import RouterLoss
from rotopo.models.saved_adapter import BaseModel
from rotopo.models.sharding import Sharding, decoder_layers, divide, share_of, whole
from rotopo.models.starting import StartingAdapter
from rotopo.pretrained import first_line


def decoder_inputs(model: PreTrainedModel, batch: PairBatch) -> AttentionInputs:
    """What the decoder takes beside token ids, the same for policy and reference."""
    return attention_inputs(batch, model.config.get_text_config(), embeddings(model).dtype)


def hidden_states(
    model: PreTrainedModel, batch: PairBatch, inputs: AttentionInputs, index: Tensor
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
        base_fingerprint: see :func:`rotopo.models.loading.fingerprint`.
        reference: another model as the reference, or a frozen copy, if there is one.

    Attributes:
        start: the adapter as it started, if that is not the identity; it is the reference then.
        base: what is known of the base model beside its fingerprint.
        moved: the initialisation of the adapter that has moved the base, if one has, see
            :mod:`rotopo.models.moved_base`.
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
        self.start: StartingAdapter | None = None
        self._fixed: list[str] = []
        # Until the model is used: what a saved start would be taken out of.
        self._originals: dict[str, Tensor] = {}
        self.moved = ""
        self.base = BaseModel("")
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

    def trained_states(self, batch: PairBatch, inputs: AttentionInputs, index: Tensor) -> Tensor:
        """As :func:`hidden_states`, of what trains; keeps the router loss of the same pass."""
        if self.router is None:
            return hidden_states(self.language_model, batch, inputs, index)
        decoder = self.language_model.base_model
        outputs = decoder(
            input_ids=batch.input_ids, use_cache=False, output_router_logits=True, **inputs
        )
        self.router_loss = self.router(batch, outputs)
        return outputs.last_hidden_state.flatten(0, 1)[index]

    def take_router_loss(self) -> Tensor:
        """The router loss of the batch that has just gone through [], which is then forgotten."""
        loss, self.router_loss = self.router_loss, None
        assert loss is not None
        return loss

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

    def divide(
        self,
        base: dict[int, torch.dtype | None],
        dtype: torch.dtype,
        sharding: Sharding,
        apart: Sequence[nn.Module],
    ) -> None:
        """Leave every rank its share of each weight, see :func:`rotopo.models.sharding.divide`.

        Args:
            base: the dtype of each of the base model's parameters, by its id.
            dtype: of what an adapter trains whole, and the narrowest of what else trains.
            sharding: how.
            apart: modules whose own weights are computed with as they are.

        Raises:
            InputError: weights of several dtypes would be one unit.
        """
        self.sharding = sharding
        models = [m for m in (self.language_model, self.reference) if m is not None]
        dtypes = base | dict.fromkeys(copies(self.language_model), dtype)
        divide(self, models, dtypes, dtype, sharding, self._compute_dtype, apart)

    @torch.no_grad()
    @in_compute_dtype
    def hidden_states(self, batch: PairBatch, reference: bool = False) -> list[Tensor] | None:
        """Hidden states of all tokens but padding, behind the embeddings and behind each layer.

        Returns:
            Each [tokens, D] in at least float32; None of a reference that is not there.
        """
        if reference and not self.has_reference:
            return None
        chosen = self.reference_model() if reference else nullcontext(self.language_model)
        with self._uncompiled(), chosen as model:
            return layer_states(model, batch)

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter on the model."""
        return isinstance(self.model, PeftModel)

    @property
    def has_reference(self) -> bool:
        """Whether there is one to compute with."""
        return self.adapted or self.reference is not None

    @contextmanager
    def reference_model(self) -> Iterator[PreTrainedModel]:
        """The reference: another model or a frozen copy; else the base under the adapter as it
        started, which is the adapter switched off where that is the identity.

        Raises:
            ValueError: there is none.
        """
        if self.reference is not None:
            yield self.reference
        elif self.start is not None:
            with self.start.in_place(self.language_model):
                yield self.language_model
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.language_model
        else:
            raise ValueError("This model was loaded without a reference.")

    def remember_start(
        self, added: Sequence[str], identity: bool, originals: dict[str, Tensor], setting: str
    ) -> None:
        """Keep what the adapter on the model starts with, where the reference or a resumed run
        needs it.

        Args:
            added: names of the parameters and buffers that the adapter has brought.
            identity: whether the adapter starts as the identity.
            originals: see :func:`rotopo.models.loading.adapt`.
            setting: what messages call the model's settings.

        Raises:
            InputError: a start beside the layers of a model that is divided.
        """
        model = self.language_model
        own = dict(tensors(model))
        trained = [name for name in added if own[name].requires_grad]
        self._fixed = [name for name in added if not own[name].requires_grad]
        self._originals = originals
        if originals:
            self.moved = str(cast(PeftModel, self.model).active_peft_config.init_lora_weights)
        if identity:
            return
        if self.sharding is not None:
            layers = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
            beside = [name for name in trained if id(own[name]) not in layers]
            if beside:
                raise InputError(
                    f"{setting}.adapter: under FSDP2 the reference cannot be the adapter as it "
                    f"started where that trains weights outside the layers ({beside[0]}): take "
                    "configs/strategies/ddp.yaml."
                )
        self.start = StartingAdapter(model, trained)

    def starting_adapter(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of the start, whole, on the processor: ``trained``, the values of
        what trains, where the reference follows from them; and ``fixed``, what the adapter does not
        train. All ranks together."""
        own = dict(tensors(self.language_model))
        start = self.start.tensors() if self.start is not None else {}
        return {
            "trained": {name: whole(value) for name, value in start.items()},
            "fixed": {name: whole(own[name]) for name in self._fixed},
        }

    @torch.no_grad()
    def start_as(self, saved: Mapping[str, dict[str, Tensor]] | None) -> None:
        """Take the start of a checkpoint, and what follows from it in the base, instead of this
        model's own.

        Args:
            saved: as of :meth:`starting_adapter`; None of a checkpoint of a version that held none,
                and whose reference was the adapter switched off.

        Raises:
            InputError: the checkpoint has another start, or the base would have to move again.
        """
        if self.moved and not (saved and saved["trained"]):
            raise InputError(
                "ckpt_path: this checkpoint does not hold what its adapter "
                f"({self.moved}) started from, as those of earlier versions do not: its base and "
                "reference cannot be made again."
            )
        if saved is None:
            if self.start is not None:
                self.start = None
                rank_zero_warn(
                    "ckpt_path: this checkpoint was written by a version whose reference was the "
                    "adapter switched off: so it is here."
                )
            return
        own = dict(tensors(self.language_model))
        trained = {name for name, value in own.items() if value.requires_grad}
        if not saved["trained"].keys() <= trained or saved["fixed"].keys() != set(self._fixed):
            raise InputError(
                "ckpt_path: this checkpoint's adapter started in another way than the one here: "
                "check the adapter's settings, its initialisation for one, and the model's path."
            )
        # Whether a start is the identity may depend on the dtype: the checkpoint's word counts.
        if not saved["trained"]:
            self.start = None
        elif self.start is None:
            self.start = StartingAdapter(self.language_model, list(saved["trained"]))
        here = self.start.tensors() if self.start is not None else {}
        for name, value in saved["fixed"].items():
            own[name].copy_(share_of(value, own[name]))
        shares = {name: share_of(value, here[name]) for name, value in saved["trained"].items()}
        differs = any(not torch.equal(share, here[name]) for name, share in shares.items())
        if not any(ranks.of_all(differs)):
            return
        for name, share in shares.items():
            here[name].copy_(share)
        if self.moved and not self._originals:
            raise InputError(
                "ckpt_path: this model has been used, and its base cannot be moved to where the "
                "checkpoint's adapter started: load the checkpoint into a new module."
            )
        move_to_start(self.language_model, self._originals, saved["trained"])

    def _uncompiled(self) -> AbstractContextManager:
        """For what runs rarely or in a new shape every time, and is not worth compiling."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _check_once(self, layout: Layout) -> None:
        self._originals = {}
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


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
