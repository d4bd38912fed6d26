"""One scale for policies of all objectives: their log-ratios to the reference and KLs, in nats."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotopo.data.batch import Role
from rotopo.metrics.bootstrap import mean_interval
from rotopo.models.log_probs import PairLogProbs, given, sum_of_role

# Of each pair: Δw and Δl; and its two responses' KL(π_ref ‖ π_θ) and KL(π_θ ‖ π_ref), each summed
# over all their tokens, and not a number where policy and reference have other vocabularies.
COLUMNS = ("chosen_log_ratio", "rejected_log_ratio", "forward_kl", "reverse_kl")


def columns(log_probs: PairLogProbs) -> list[Tensor]:
    """The values of :data:`COLUMNS` of B rows, each [B].

    Args:
        log_probs: of a policy that has been compared with its reference.
    """
    tokens = given(log_probs.tokens, "tokens")

    def of_pair(kl: Tensor | None) -> Tensor:
        if kl is None:
            return torch.full_like(log_probs.chosen, torch.nan)
        return sum(  # type: ignore[return-value]
            sum_of_role(kl, role, tokens.role, tokens.pair, len(log_probs.chosen))
            for role in (Role.CHOSEN, Role.REJECTED)
        )

    ratios = log_probs.chosen_log_ratio, log_probs.rejected_log_ratio
    return [*ratios, of_pair(tokens.forward_kl), of_pair(tokens.reverse_kl)]


def yardstick(
    values: Mapping[str, np.ndarray],
    chosen_tokens: np.ndarray,
    rejected_tokens: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """How far a policy is from its reference on n pairs, whatever it was trained by.

    The keys, with Δw and Δl the log-ratios log π_θ(y|x) − log π_ref(y|x) of a pair's chosen and
    rejected response:

    - ``margin``: h = Δw − Δl, mean over pairs, in nats; ``margin_interval``: its 95 % interval.
    - ``accuracy``: the share of pairs with h > 0; ``accuracy_interval``.
    - ``log_ratio``: Δw (``chosen``) and Δl (``rejected``), means over pairs, in nats a response.
    - ``log_ratio_per_token``: the same, each divided by its response's tokens before the mean.
    - ``displaced``: the share of pairs whose chosen response is less likely than under the
      reference (likelihood displacement).
    - ``kl_per_token``: ``on_data``: the KL of whole next-token distributions, each after a
      response of the data up to there, mean over all tokens of both responses, in nats a token:
      ``forward`` is KL(π_ref ‖ π_θ), ``reverse`` KL(π_θ ‖ π_ref). No KL of responses, for which
      they would have to be drawn from one of the two. None where the vocabularies differ.

    Args:
        values: of :data:`COLUMNS`, each [n], n ≥ 1.
        chosen_tokens, rejected_tokens: lengths of the responses [n].
        clusters: what each pair belongs to, for the intervals.
    """
    chosen, rejected, forward, reverse = (values[name] for name in COLUMNS)
    margin = chosen - rejected
    n_tokens = (chosen_tokens + rejected_tokens).sum()
    kls = {"forward": forward.sum() / n_tokens, "reverse": reverse.sum() / n_tokens}
    return {
        "margin": float(margin.mean()),
        "margin_interval": list(mean_interval(margin, clusters)),
        "accuracy": float((margin > 0).mean()),
        "accuracy_interval": list(mean_interval(margin > 0, clusters)),
        "log_ratio": {"chosen": float(chosen.mean()), "rejected": float(rejected.mean())},
        "log_ratio_per_token": {
            "chosen": float((chosen / chosen_tokens).mean()),
            "rejected": float((rejected / rejected_tokens).mean()),
        },
        "displaced": float((chosen < 0).mean()),
        "kl_per_token": {"on_data": {k: None if np.isnan(v) else float(v) for k, v in kls.items()}},
    }
