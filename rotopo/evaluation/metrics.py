"""Metrics over pairs, exact under any batch size and any number of ranks."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rotopo.errors import InputError
from rotopo.evaluation.bootstrap import mean_interval
from rotopo.evaluation.rewardbench import section_scores

_CALIBRATION_BINS = 15
# Of the longer response: lengths that differ by no more are matched.
_MATCHED = 0.1


class PairMeans(Metric):
    """Means over pairs of several named values.

    Sums and counts are kept in float64 and added over ranks, so that neither the split into
    batches nor a smaller last batch counts. Unpaired rows have some of the values only, so each
    has its own count.

    Args:
        names: the values' names.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), "sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), "sum")

    def update(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch: for each name its values [B], and which rows have one [B]."""
        pairs = [values[name] for name in self.names]
        self.sums += torch.stack([torch.where(has, v, 0).double().sum() for v, has in pairs])
        self.counts += torch.stack([has.sum() for _, has in pairs])

    def compute(self) -> dict[str, Tensor]:
        """The means of the values that any row had."""
        means = (self.sums / self.counts).unbind()
        present = (self.counts > 0).tolist()
        return {n: m for n, m, p in zip(self.names, means, present, strict=True) if p}


@dataclass(frozen=True)
class ScoredPairs:
    """n pairs with the rewards of their responses, in the order of their rows; arrays [n].

    Attributes:
        rows: index of each pair in the source data.
        chosen, rejected: rewards.
        chosen_tokens, rejected_tokens: lengths of the responses in tokens.
    """

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray


class RewardMetrics(Metric):
    """:func:`reward_metrics` of all pairs, whatever the batches, the ranks and their shares.

    The pairs themselves are kept, at 40 bytes each, and put in the order of their rows.

    Args:
        groups: the name of each row's group, for the accuracy by group; None for none.
        clusters: what each row belongs to, for the interval; None where rows are independent.
    """

    full_state_update = False
    table: list[Tensor] | Tensor

    def __init__(
        self,
        groups: Mapping[int, str] | None = None,
        clusters: Mapping[int, Hashable] | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.clusters = clusters
        # One state, so that ranks exchange it at once; float64 holds rows and lengths exactly.
        self.add_state("table", [], "cat")
        self.set_dtype(torch.float64)  # of what a rank without pairs contributes

    def update(
        self,
        rows: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        chosen_tokens: Tensor,
        rejected_tokens: Tensor,
    ) -> None:
        """Add a batch of pairs: their rows, rewards and lengths in tokens, each [B]."""
        columns = (rows, chosen, rejected, chosen_tokens, rejected_tokens)
        assert isinstance(self.table, list)
        self.table.append(torch.stack([c.detach().double() for c in columns], 1).flatten())

    def pairs(self) -> ScoredPairs:
        """This rank's pairs; within ``sync_context`` those of all ranks."""
        whole = dim_zero_cat(self.table) if len(self.table) else torch.empty(0)
        table = whole.reshape(-1, 5).cpu().numpy().astype(np.float64)
        rows, chosen, rejected, *tokens = table[np.argsort(table[:, 0], kind="stable")].T
        lengths = [column.astype(np.int64) for column in tokens]
        return ScoredPairs(rows.astype(np.int64), chosen, rejected, *lengths)

    def compute(self) -> dict[str, Any]:
        """:func:`reward_metrics`; empty where there is no pair."""
        pairs = self.pairs()
        return reward_metrics(pairs, self.groups, self.clusters) if len(pairs.rows) else {}


def reward_metrics(
    pairs: ScoredPairs,
    groups: Mapping[int, str] | None = None,
    clusters: Mapping[int, Hashable] | None = None,
) -> dict[str, Any]:
    """How well rewards tell chosen from rejected responses, and what else they follow.

    ``None`` stands for what these pairs do not define (a correlation with lengths that are all the
    same, say). The keys:

    - ``pairs``: n; ``ties``: those whose rewards are equal, as all are under a policy that is still
      its own reference.
    - ``accuracy``: the share of pairs whose chosen response has the larger reward. A tie counts
      as wrong, as in the logged ``rewards/accuracy``.
    - ``accuracy_interval``: its 95 % percentile bootstrap interval, over clusters where given.
    - ``reward_mean``, ``reward_std``: over all 2n responses; the standard deviation is the
      sample's (n − 1).
    - ``chosen_mean``, ``rejected_mean``.
    - ``auroc``: the probability that a chosen response of any pair has a larger reward than a
      rejected one of any pair, ties half (Mann-Whitney). Below the accuracy where rewards are
      comparable within a prompt only.
    - ``ece``: expected calibration error (Guo et al. 2017) of the Bradley-Terry model, which takes
      σ(r_w − r_l) for the probability of the label: confidence max(p, 1 − p) in 15 equal bins from
      one half to one, a tie being half right.
    - ``length_correlation``, ``length_rank_correlation``: Pearson's and Spearman's, of reward and
      tokens over all responses.
    - ``length_matched_accuracy``, ``length_matched_pairs``: over the pairs whose lengths differ by
      at most a tenth of the longer [ours].
    - ``groups``: pairs and accuracy of each group, by name.
    - ``sections``: only where the groups are RewardBench's subsets, see
      :func:`rotopo.evaluation.rewardbench.section_scores`.

    Args:
        pairs: n ≥ 1.
        groups: the name of each row's group.
        clusters: what each row belongs to.

    Raises:
        InputError: a reward is not finite.
    """
    rewards = np.concatenate([pairs.chosen, pairs.rejected])
    tokens = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
    broken = pairs.rows[~np.isfinite(pairs.chosen) | ~np.isfinite(pairs.rejected)]
    if len(broken):
        raise InputError(
            f"{len(broken)} of {len(pairs.rows)} pairs have a reward that is not finite (row "
            f"{broken[0]} for one): the model has diverged; train it at a lower learning rate."
        )
    margin = pairs.chosen - pairs.rejected
    right = margin > 0
    n = len(right)

    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum((2 * confidence - 1) * _CALIBRATION_BINS, _CALIBRATION_BINS - 1)
    gaps = np.bincount(bins.astype(int), (1 + np.sign(margin)) / 2 - confidence)
    longer = np.maximum(pairs.chosen_tokens, pairs.rejected_tokens)
    matched = np.abs(pairs.chosen_tokens - pairs.rejected_tokens) <= _MATCHED * longer
    cluster_of = None if clusters is None else [clusters[row] for row in pairs.rows.tolist()]
    found: dict[str, Any] = {
        "pairs": n,
        "ties": int((margin == 0).sum()),
        "accuracy": float(right.mean()),
        "accuracy_interval": list(mean_interval(right, cluster_of)),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(ddof=1)),
        "chosen_mean": float(pairs.chosen.mean()),
        "rejected_mean": float(pairs.rejected.mean()),
        "auroc": auroc(pairs.chosen, pairs.rejected),
        "ece": float(np.abs(gaps).sum() / n),
        "length_correlation": _correlation(rewards, tokens),
        "length_rank_correlation": _correlation(_ranks(rewards), _ranks(tokens)),
        "length_matched_accuracy": float(right[matched].mean()) if matched.any() else None,
        "length_matched_pairs": int(matched.sum()),
        "groups": {},
    }
    if groups is not None:
        names = np.array([groups[row] for row in pairs.rows.tolist()])
        found["groups"] = {
            str(name): {
                "pairs": int((names == name).sum()),
                "accuracy": float(right[names == name].mean()),
            }
            for name in np.unique(names)
        }
        by_name = {k: (v["pairs"], v["accuracy"]) for k, v in found["groups"].items()}
        sections = section_scores(by_name)
        if sections is not None:
            found["sections"] = sections
    return found


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that one of the positive values [n] is above one of the negative [m], ties
    half (Mann and Whitney)."""
    n, m = len(positive), len(negative)
    rank_sum = _ranks(np.concatenate([positive, negative]))[:n].sum()
    return float((rank_sum - n * (n + 1) / 2) / (n * m))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
