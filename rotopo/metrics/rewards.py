"""Metrics of the rewards of all pairs, exact under any batch size and any number of ranks."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rotopo.devices import exact
from rotopo.errors import InputError
from rotopo.metrics.bootstrap import mean_interval
from rotopo.metrics.calibration import calibration_error
from rotopo.metrics.ranking import auroc, correlation, mean_ranks
from rotopo.metrics.reward_bench_2 import reward_bench_2
from rotopo.metrics.rewardbench import section_scores
from rotopo.metrics.yardstick import COLUMNS, yardstick

# Of the longer response: lengths that differ by no more are matched.
_MATCHED = 0.1


@dataclass(frozen=True)
class ScoredPairs:
    """n pairs with the rewards of their responses, in the order of their rows; arrays [n].

    Attributes:
        rows: index of each pair in the source data.
        chosen, rejected: rewards.
        chosen_tokens, rejected_tokens: lengths of the responses in tokens.
        beside: further values of the pairs, by name.
    """

    rows: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)

    def only(self, kept: np.ndarray) -> "ScoredPairs":
        """Some of them.

        Args:
            kept: which [n].
        """
        beside = {name: column[kept] for name, column in self.beside.items()}
        lengths = self.chosen_tokens[kept], self.rejected_tokens[kept]
        return ScoredPairs(
            self.rows[kept], self.chosen[kept], self.rejected[kept], *lengths, beside
        )


class RewardMetrics(Metric):
    """:func:`reward_metrics` of all pairs, whatever the batches, the ranks and their shares.

    The pairs themselves are kept, at 40 bytes each (72 of a policy that is compared), and put in
    the order of their rows.

    Args:
        groups: the name of each row's group, for the accuracy by group; None for none.
        clusters: what each row belongs to, for the interval; None where rows are independent.
        sets: the name of each row's set, where the pairs are of several; each has metrics of its
            own, under ``sets``.
        compared: whether the pairs come with :data:`rotopo.metrics.yardstick.COLUMNS`, of a policy
            that is compared with its reference.
        places: which of RewardBench 2's responses a row holds, of its rows.
    """

    full_state_update = False
    table: list[Tensor] | Tensor

    def __init__(
        self,
        groups: Mapping[int, str] | None = None,
        clusters: Mapping[int, Hashable] | None = None,
        sets: Mapping[int, str] | None = None,
        compared: bool = False,
        places: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.sets = sets
        self.groups = groups
        self.clusters = clusters
        self.beside = COLUMNS if compared else ()
        self.places = places or {}
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
        *beside: Tensor,
    ) -> None:
        """Add a batch of pairs: their rows, rewards and lengths in tokens, each [B]; and of a
        policy that is compared the columns of the comparison."""
        columns = (rows, chosen, rejected, chosen_tokens, rejected_tokens, *beside)
        assert isinstance(self.table, list)
        self.table.append(torch.stack([exact(c.detach()) for c in columns], 1).flatten())

    def pairs(self) -> ScoredPairs:
        """This rank's pairs; within ``sync_context`` those of all ranks."""
        whole = dim_zero_cat(self.table) if len(self.table) else torch.empty(0)
        table = whole.reshape(-1, 5 + len(self.beside)).cpu().numpy().astype(np.float64)
        rows, chosen, rejected, *others = table[np.argsort(table[:, 0], kind="stable")].T
        chosen_tokens, rejected_tokens = (column.astype(np.int64) for column in others[:2])
        beside = dict(zip(self.beside, others[2:], strict=True))
        rows = rows.astype(np.int64)
        return ScoredPairs(rows, chosen, rejected, chosen_tokens, rejected_tokens, beside)

    def compute(self) -> dict[str, Any]:
        """:func:`reward_metrics`; of a policy that is compared also ``yardstick``, see
        :func:`rotopo.metrics.yardstick.yardstick`, and of RewardBench 2's pairs ``reward_bench_2``,
        see :func:`rotopo.metrics.reward_bench_2.reward_bench_2`. Empty where there is no pair."""
        pairs = self.pairs()
        if not len(pairs.rows):
            return {}
        found = self._of(pairs)
        if self.sets:
            names = np.array([self.sets[row] for row in pairs.rows.tolist()])
            found["sets"] = {
                str(name): self._of(pairs.only(names == name))
                for name in dict.fromkeys(names.tolist())
            }
        if own := [row for row in pairs.rows.tolist() if row in self.places]:
            part = pairs.only(np.isin(pairs.rows, own))
            found["reward_bench_2"] = reward_bench_2(
                [self.places[row] for row in own], part.chosen.tolist(), part.rejected.tolist()
            )
        return found

    def _of(self, pairs: ScoredPairs) -> dict[str, Any]:
        found = reward_metrics(pairs, self.groups, self.clusters)
        if self.beside:
            lengths = pairs.chosen_tokens, pairs.rejected_tokens
            clusters = _clusters_of(pairs, self.clusters)
            found["yardstick"] = yardstick(pairs.beside, *lengths, clusters)
        return found


def _clusters_of(
    pairs: ScoredPairs, clusters: Mapping[int, Hashable] | None
) -> list[Hashable] | None:
    return None if clusters is None else [clusters[row] for row in pairs.rows.tolist()]


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
    - ``ece``: :func:`rotopo.metrics.calibration.calibration_error` of the margins.
    - ``length_correlation``, ``length_rank_correlation``: Pearson's and Spearman's, of reward and
      tokens over all responses.
    - ``length_matched_accuracy``, ``length_matched_pairs``: over the pairs whose lengths differ by
      at most a tenth of the longer [ours].
    - ``groups``: pairs and accuracy of each group, by name.
    - ``sections``: only where the groups are RewardBench's subsets, see
      :func:`rotopo.metrics.rewardbench.section_scores`.

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

    longer = np.maximum(pairs.chosen_tokens, pairs.rejected_tokens)
    matched = np.abs(pairs.chosen_tokens - pairs.rejected_tokens) <= _MATCHED * longer
    cluster_of = _clusters_of(pairs, clusters)
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
        "ece": calibration_error(margin),
        "length_correlation": correlation(rewards, tokens),
        "length_rank_correlation": correlation(mean_ranks(rewards), mean_ranks(tokens)),
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
