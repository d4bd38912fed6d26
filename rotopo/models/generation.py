"""Responses to prompts, token by token.

Equal prompts are read once, whatever the number of responses to them. Responses that have ended
leave the batch. Each draws by random numbers of its own, so that what else is in the batch does not
matter, but for the rounding of products of other shapes.

transformers' continuous batching (``generate_batch``, 5.24) is none of this: it refuses the
attention ``segments``, fails with multi-head latent attention and on GPT-2, spends seconds of every
call on its own memory on a processor, and draws from one global state in the order of its queue.
"""

import inspect
import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rotopo import ranks
from rotopo.data.batch import PromptBatch
from rotopo.errors import InputError
from rotopo.models.settings import Sampling

# Columns of keys that are made room for at a time.
_ROOM = 128
# Ended responses leave once they are this share of the batch: fewer copies of its keys [ours].
_ENDED = 1 / 8
# The likeliest tokens, of which top_p's set is nearly always.
_LIKELY = 1024
# Probabilities are counted in 1 / this: sums of whole numbers are exact, and the same on a GPU each
# time, where torch refuses others' with trainer.deterministic.
_WHOLE = 2**53


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    prompts: PromptBatch,
    sampling: Sampling,
    stop_ids: list[int],
    together: bool = False,
) -> list[list[int]]:
    """Response token ids for each of B prompts, without the stop token.

    Args:
        model: in evaluation mode.
        prompts: whose row numbers say which random numbers each response draws.
        sampling: how to choose tokens; prompts that have temperatures are sampled at theirs.
        stop_ids: tokens that end a response.
        together: all ranks respond at the same time, and a model that is divided among them needs
            each for every token: who has ended goes on until all have.

    Raises:
        InputError: a logit is not finite.
    """
    device = prompts.input_ids.device
    choose = _Choice(sampling, prompts)
    # The place of each different prompt, and which of them each response follows.
    first: dict[tuple[int, ...], int] = {}
    lines = torch.cat([prompts.attention_mask, prompts.input_ids], dim=1).tolist()
    which = [first.setdefault(tuple(line), len(first)) for line in lines]
    once = [which.index(number) for number in range(len(first))]
    reader = _Reader(model, prompts.attention_mask[once])
    logits = reader.read(prompts.input_ids[once])
    if len(once) < len(which):
        logits = logits[which]
        reader.select(which)
    responses: list[list[int]] = [[] for _ in which]
    places = list(range(len(which)))  # of those in the batch
    going = set(places)
    for step in range(sampling.max_new_tokens):
        tokens = choose(logits, places, step)
        for place, token in zip(places, tokens.tolist(), strict=True):
            if token in stop_ids:
                going.discard(place)
            elif place in going:
                responses[place].append(token)
        left = torch.tensor(len(going), device=device)
        if step + 1 == sampling.max_new_tokens or not (ranks.total(left) if together else going):
            break
        if going and len(going) <= (1 - _ENDED) * len(places):
            kept = [i for i, place in enumerate(places) if place in going]
            places = [places[i] for i in kept]
            tokens = tokens[kept]
            reader.select(kept)
        logits = reader.read(tokens[:, None])
    return responses


class _Reader:
    """What a batch has read so far, and the model that reads on.

    Args:
        model: the model.
        mask: which of the tokens that it will read first are no padding [b, T].
    """

    def __init__(self, model: PreTrainedModel, mask: Tensor) -> None:
        takes = inspect.signature(model.forward).parameters
        self.model = model
        # The cache's name in transformers, and in its earlier versions.
        self.name = next((name for name in ("cache", "past_key_values") if name in takes), None)
        self.last_only = "logits_to_keep" in takes
        self.positioned = "position_ids" in takes
        self.mask = mask
        self.padded = not bool(mask.all())
        self.cache: Cache | None = None
        self.tokens = mask[:, :0]

    def read(self, tokens: Tensor) -> Tensor:
        """Logits of what follows the next tokens [b, n] of each row -> [b, V], in float32 at
        least."""
        first = not self.tokens.shape[1]
        known = 0 if self.cache is None else self.tokens.shape[1]
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        new = self.tokens.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), new)], dim=1)
        options: dict[str, Any] = {}
        if self.cache is not None:
            options[str(self.name)] = self.cache
        if self.last_only:
            # As an index: of the slice that a count becomes, torch.matmul would copy the head's
            # weight for each row.
            options["logits_to_keep"] = self.mask.new_tensor([self.tokens.shape[1] - known - 1])
        if self.positioned:
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)
        model: Any = self.model
        inputs = model.prepare_inputs_for_generation(
            self.tokens,
            next_sequence_length=self.tokens.shape[1] - known,
            attention_mask=self.mask if self.padded else None,
            use_cache=first or self.cache is not None,
            is_first_iteration=first,
            **options,
        )
        outputs = model(**inputs)
        if first:
            self._keep(getattr(outputs, self.name or "", None))
        logits = outputs.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def select(self, rows: list[int]) -> None:
        """Go on with these rows, in this order; a row may be there several times."""
        self.mask, self.tokens = self.mask[rows], self.tokens[rows]
        if self.cache is not None:
            index: Any = torch.tensor(rows, device=self.mask.device)
            self.cache.reorder_cache(index)

    def _keep(self, cache: Any) -> None:
        if not isinstance(cache, Cache):
            rank_zero_warn(
                f"{self.model.config.model_type} keeps no keys that rows can be selected of: each "
                "token is generated from all tokens before it, which is slow."
            )
            return
        self.cache = cache
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[number] = _RoomyLayer(layer)


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for more, where transformers copies all for every token.

    Args:
        filled: what has been read.
    """

    keys: Any
    values: Any

    def __init__(self, filled: DynamicLayer) -> None:
        super().__init__()
        self.__dict__ |= vars(filled)
        self._rooms = [self.keys, self.values]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            self._rooms = [_with_room(x, end + _ROOM) for x in (self.keys, self.values)]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., begin:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._rooms = [self.keys, self.values]


def _with_room(x: Tensor, columns: int) -> Tensor:
    """A copy [..., columns, d] of x [..., fewer, d], unfilled behind it."""
    room = x.new_empty(*x.shape[:-2], columns, x.shape[-1])
    room[..., : x.shape[-2], :] = x
    return room


class _Choice:
    """Chooses the next tokens of responses.

    Args:
        sampling: how.
        prompts: whose rows say which random numbers each response draws.
    """

    def __init__(self, sampling: Sampling, prompts: PromptBatch) -> None:
        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        self.temperatures = prompts.temperatures
        own = self.temperatures
        self.draws = bool(self.temperature if own is None else own.any())
        if self.draws:
            rows, device = prompts.rows.tolist(), prompts.input_ids.device
            # Of neighbouring numbers too NumPy makes states that have nothing in common.
            states = [np.random.default_rng([sampling.seed % 2**64, row]) for row in rows]
            drawn = np.stack([state.random(sampling.max_new_tokens) for state in states])
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.uniform = torch.from_numpy(drawn).to(device, dtype)

    def __call__(self, logits: Tensor, places: list[int], step: int) -> Tensor:
        """Tokens [b] that follow.

        Args:
            logits: [b, V].
            places: of the responses among all B.
            step: how many tokens they have.

        Raises:
            InputError: a logit is not finite.
        """
        highest, likeliest = logits.max(-1)
        if not highest.isfinite().all():
            raise InputError("a logit is not finite: the model has diverged.")
        if not self.draws:
            return likeliest
        temperature: float | Tensor = self.temperature
        greedy = None
        if self.temperatures is not None:
            own = self.temperatures[places]
            greedy = own == 0
            temperature = own.masked_fill(greedy, 1.0)[:, None]
        p = ((logits / temperature).softmax(-1) * _WHOLE).long()
        tokens = None
        if self.top_p < 1:
            p, tokens = _likeliest(p, self.top_p)
        # By the inverse of the distribution function.
        reached = p.cumsum(-1)
        total = reached[:, -1:]
        drawn = (self.uniform[places, step][:, None] * total).long().minimum(total - 1)
        index = torch.searchsorted(reached, drawn, right=True)
        chosen = (index if tokens is None else tokens.gather(1, index)).squeeze(1)
        return chosen if greedy is None else torch.where(greedy, likeliest, chosen)


def _likeliest(p: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, as many as it takes to reach a share: their probabilities (as counted
    here), zero from there on, and ids, each [b, at most V]."""
    least = math.ceil(share * _WHOLE)
    for size in (_LIKELY, p.shape[1]):
        found, tokens = p.topk(min(size, p.shape[1]))
        reached = found.cumsum(-1)
        if (reached[:, -1] >= least).all():
            break
    return found * (reached - found < least), tokens
