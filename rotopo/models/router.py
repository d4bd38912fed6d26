"""The router loss of a mixture of experts, which keeps its experts evenly used.

It is transformers' own [2nd], by the function of the model's family: E · Σ_e f_e P_e over the E
experts, where f_e is how often a token chooses expert e and P_e the mean probability that the
router gives it, over a micro-batch's tokens and all layers together (after the Switch Transformer,
arXiv 2101.03961, equations 4-6).

It does not add up over micro-batches and ranks: what a step adds to its loss is the plain mean over
its micro-batches, so that this one number depends on how the step is cut.
"""

import inspect
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rotopo.data.batch import PairBatch
from rotopo.errors import InputError
from rotopo.models.attention import row_numbers
from rotopo.models.settings import BackboneConfig

# What a family's function has to take for us to call it.
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class RouterLoss:
    """A family's router loss.

    Attributes:
        coefficient: what it is multiplied by in the training loss, above 0.
        function: the family's ``load_balancing_loss_func``.
        top_k: experts that a token is sent to.
        setting: what messages call the coefficient.
    """

    coefficient: float
    function: Callable[..., Tensor]
    top_k: int
    setting: str

    @classmethod
    def of(cls, model: PreTrainedModel, config: BackboneConfig) -> Self | None:
        """The router loss that a model is to be trained with; None where there is none.

        Raises:
            InputError: the settings ask for one that the model does not have, or the model's
                configuration for one that cannot be computed.
        """
        setting, asked = f"{config.setting}.router_loss", config.router_loss
        if asked is not None and not 0 <= asked < math.inf:
            raise InputError(f"{setting} is {asked}: it has to be at least 0.")
        if asked == 0:
            return None
        text, name = model.config.get_text_config(), model.config.model_type
        own = getattr(text, "router_aux_loss_coef", None)
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if not _has_routers(model):
            if asked is not None:
                raise InputError(
                    f"{setting} is {asked}, but {name} is no mixture of experts: leave it out."
                )
            return None
        if asked is None and own is None and function is None:  # balanced in another way
            if getattr(text, "aux_loss_alpha", None):  # of DeepSeek's own code
                warnings.warn(
                    f"{name}: its configuration asks for an auxiliary loss of the experts "
                    f"(aux_loss_alpha {text.aux_loss_alpha}), which transformers does not have: "
                    "it is left out.",
                    stacklevel=2,
                )
            return None
        if asked is None and own == 0:
            return None
        top_k = getattr(text, "num_experts_per_tok", None)
        known = function is not None and list(inspect.signature(function).parameters)
        if top_k is None or known != _PARAMETERS:
            raise InputError(
                f"{setting}: transformers has no router loss for {name} that could be computed "
                "here: set it to 0 to train without one."
            )
        coefficient = own if asked is None else asked
        if coefficient is None:
            raise InputError(
                f"{setting}: {name} has a router loss, and its configuration no "
                "router_aux_loss_coef: set its coefficient, or 0 to train without one."
            )
        assert function is not None
        return cls(coefficient, function, top_k, setting)

    def __call__(self, batch: PairBatch, outputs: ModelOutput) -> Tensor:
        """The loss of a batch [], with its gradient, before the coefficient.

        Args:
            batch: R lines of T tokens.
            outputs: of the decoder, with the router logits [R·T, E] of each layer with experts.

        Raises:
            InputError: the model's routers told nothing.
        """
        layers = outputs.get("router_logits")
        if not layers:
            raise InputError(
                f"{self.setting}: the model gives no router logits: set it to 0 to train without "
                "a router loss."
            )
        logits = tuple(layer.flatten(0, -2) for layer in layers)
        return self.function(logits, logits[0].shape[-1], self.top_k, sharers(batch))


def _has_routers(model: PreTrainedModel) -> bool:
    """Whether the model has any of the modules that its family says are routers; families with
    mixtures of experts have dense models too."""
    kinds: list[Any] = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            found = (part._can_record_outputs or {}).get("router_logits", [])
            kinds += found if isinstance(found, list) else [found]
    classes = tuple(getattr(kind, "target_class", kind) for kind in kinds)
    return any(isinstance(module, classes) for module in model.modules())


def sharers(batch: PairBatch) -> Tensor:
    """How many responses a token is there for, 0 for padding [R, T].

    A prompt's token counts once for each response behind it, so that layouts agree.
    """
    if batch.layout == "padded":
        of_prompt = torch.ones_like(batch.segment_ids)
    else:
        each = torch.ones_like(batch.pairs)
        of_row = each.new_zeros(batch.n_pairs).index_add(0, batch.pairs, each)
        of_prompt = of_row[row_numbers(batch)]
    return torch.where(batch.segment_ids == 0, of_prompt, batch.segment_ids.sign().clamp(min=0))
