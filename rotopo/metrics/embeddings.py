"""Responses as points, from which a map of them is drawn."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotopo.data.batch import PairBatch
from rotopo.models.backbone import decoder_inputs, hidden_states


@torch.no_grad()
def response_embeddings(
    model: PreTrainedModel, batches: Iterable[PairBatch]
) -> tuple[Tensor, Tensor]:
    """The mean over a response's tokens of the last hidden states that predict them.

    Args:
        model: a decoder, with or without a head; dropout is left as it is.
        batches: rows of S responses in all.

    Returns:
        Embeddings [S, D] in float32, and the responses' roles [S].
    """
    points, roles = [], []
    for batch in batches:
        here = batch.to(next(model.parameters()).device)
        states = hidden_states(model, here, decoder_inputs(model, here), here.predictors).float()
        sums = states.new_zeros(len(here.lengths), states.shape[1])
        sums.index_add_(0, here.owners, states)
        points.append((sums / here.lengths[:, None]).cpu())
        roles.append(batch.roles)
    return torch.cat(points), torch.cat(roles)
