"""The decoder inside policies and reward models: hidden states, with and without the adapter."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotopo.data.batch import Layout, PairBatch
from rotopo.errors import InputError
from rotopo.models.attention import AttentionInputs, attention_inputs
from rotopo.models.beside import copies, embeddings
from rotopo.models.compilation import compile_layers
from rotopo.models.mixed_precision import Masters, in_compute_dtype
from rotopo.models.router import RouterLoss
from rotopo.models.sharding import Sharding, divide
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
