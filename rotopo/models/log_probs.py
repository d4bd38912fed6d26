"""Per-token log-probs -> what objectives are functions of: sums over responses, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from rotopo.data.batch import PairBatch, Role
from rotopo.models.head import Head, TokenLogProbs, token_log_probs


@dataclass(frozen=True)
class ResponseTokens:
    """The N response tokens of a batch, in the order of its responses, all [N].

    Attributes:
        pair: the row (0..B-1) of each token.
        role: the :class:`~rotopo.data.batch.Role` of its response.
        position: its place in the response, from 0.
        log_prob: log π_θ(token | what precedes it), nats.
        reference: the same under the reference, or None.
        sum_squared: Σ_v p_v² of the distribution that it comes from, or None.
        forward_kl, reverse_kl: KL(π_ref ‖ π_θ) and KL(π_θ ‖ π_ref) of the next-token distributions
            that it comes from, nats, in a test of the policy; else None.
    """

    pair: Tensor
    role: Tensor
    position: Tensor
    log_prob: Tensor
    reference: Tensor | None = None
    sum_squared: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None

    def detach(self) -> Self:
        return _detached(self)


@dataclass(frozen=True)
class PairLogProbs:
    """What objectives are functions of: B rows, sums over each response's tokens, in nats.

    A row of unpaired data has a single response: the other's length and log-probs are 0.

    Attributes:
        chosen, rejected: log π_θ(y_w|x) and log π_θ(y_l|x) [B].
        chosen_length, rejected_length: response tokens, the end-of-turn token included [B].
        reference_chosen, reference_rejected: the log-probs under the reference [B], or None for
            objectives that have none.
        mismatched_log_ratio: log π_θ/π_ref of the M responses to other prompts [M], no gradient.
        gold, gold_length: log π_θ of the gold response [B], and its tokens [B].
        reference_kl: Σ_t KL(π_ref(·|x, y_<t) ‖ π_θ(·|x, y_<t)) along a response y from the
            reference [B].
        rows: index of each row in the source data [B].
        tokens: per-token values, for objectives that weigh tokens.
        handed: what a module hands its objective beside log-probs, by name, without gradient.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    mismatched_log_ratio: Tensor | None = None
    gold: Tensor | None = None
    gold_length: Tensor | None = None
    reference_kl: Tensor | None = None
    rows: Tensor | None = None
    tokens: ResponseTokens | None = None
    handed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def chosen_log_ratio(self) -> Tensor:
        """Δw = log π_θ(y_w|x) − log π_ref(y_w|x) [B]."""
        return self.chosen - given(self.reference_chosen, "reference_chosen")

    @property
    def rejected_log_ratio(self) -> Tensor:
        """Δl = log π_θ(y_l|x) − log π_ref(y_l|x) [B]."""
        return self.rejected - given(self.reference_rejected, "reference_rejected")

    @property
    def chosen_mean(self) -> Tensor:
        """c̄: log π_θ of the chosen response per token [B]."""
        return self.chosen / self.chosen_length.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """r̄: log π_θ of the rejected response per token [B]."""
        return self.rejected / self.rejected_length.clamp(min=1)

    @property
    def has_chosen(self) -> Tensor:
        """Whether the row has a chosen response [B]."""
        return self.chosen_length > 0

    @property
    def has_rejected(self) -> Tensor:
        """Whether the row has a rejected response [B]."""
        return self.rejected_length > 0

    def hand(self, **values: Tensor) -> Self:
        """The same with values beside the log-probs."""
        return replace(self, handed={**self.handed, **values})

    def weighted(self, weights: Tensor) -> Self:
        """The same with every token's log-prob multiplied by its weight [N]."""
        tokens = given(self.tokens, "tokens")

        def total(values: Tensor, role: Role) -> Tensor:
            B = len(self.chosen)
            return sum_of_role(weights * values, role, tokens.role, tokens.pair, B)

        sums: dict[str, Any] = {
            "chosen": total(tokens.log_prob, Role.CHOSEN),
            "rejected": total(tokens.log_prob, Role.REJECTED),
        }
        if tokens.reference is not None:
            sums["reference_chosen"] = total(tokens.reference, Role.CHOSEN)
            sums["reference_rejected"] = total(tokens.reference, Role.REJECTED)
        return replace(self, **sums)

    def detach(self) -> Self:
        return _detached(self)


def sum_of_role(values: Tensor, role: Role, roles: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Each row's sum of the values that have the role [n_rows].

    Args:
        values: of tokens or of responses [n].
        role: which of them count.
        roles: the role of each value [n].
        rows: the row of each value [n].
        n_rows: B.
    """
    of_role = torch.where(roles == role, values, 0)
    return values.new_zeros(n_rows).index_add(0, rows, of_role)


T = TypeVar("T")


def _detached(values: Any) -> Any:
    """A dataclass of tensors, cut from the graph."""
    parts = {f.name: getattr(values, f.name) for f in fields(values)}
    tensors = {k: v.detach() for k, v in parts.items() if hasattr(v, "detach")}
    return replace(values, **tensors)


def given(value: T | None, name: str) -> T:
    """A field of :class:`PairLogProbs`, or an error that says how to get it."""
    if value is None:
        raise ValueError(
            f"The log-probs hold no {name}: an objective says in its `needs` what it works on."
        )
    return value


def handed(log_probs: PairLogProbs, name: str) -> Tensor:
    """A value that a module has handed its objective, or an error that says how to get it."""
    if name not in log_probs.handed:
        raise ValueError(
            f"The log-probs come without {name}: an objective is handed it by its `complete`."
        )
    return log_probs.handed[name]


def pair_log_probs(
    batch: PairBatch,
    tokens: TokenLogProbs,
    reference: Tensor | None = None,
    roles: tuple[Role, ...] = (),
) -> PairLogProbs:
    """Sum per-token values over the responses of each row.

    Args:
        batch: B rows with N response tokens.
        tokens: of the policy, each [N].
        reference: log-probs under the reference [N], or None.
        roles: :attr:`.Needs.roles`; mismatched responses are picked out only for who asks, since
            picking waits for a GPU.
    """
    S, B = len(batch.roles), batch.n_pairs
    first = batch.lengths.cumsum(0) - batch.lengths

    def per_response(values: Tensor) -> Tensor:
        return values.new_zeros(S).index_add(0, batch.owners, values)

    def per_row(values: Tensor, role: Role) -> Tensor:
        return sum_of_role(values, role, batch.roles, batch.pairs, B)

    policy = per_response(tokens.log_prob)
    optional: dict[str, Any] = {}
    if reference is not None:
        base = per_response(reference)
        optional["reference_chosen"] = per_row(base, Role.CHOSEN)
        optional["reference_rejected"] = per_row(base, Role.REJECTED)
        if Role.MISMATCHED in roles:
            mismatched = batch.roles == Role.MISMATCHED
            optional["mismatched_log_ratio"] = (policy.detach() - base)[mismatched]
    if tokens.kl is not None:
        optional["reference_kl"] = per_row(per_response(tokens.kl), Role.REFERENCE_SAMPLE)
    return PairLogProbs(
        chosen=per_row(policy, Role.CHOSEN),
        rejected=per_row(policy, Role.REJECTED),
        chosen_length=per_row(batch.lengths, Role.CHOSEN),
        rejected_length=per_row(batch.lengths, Role.REJECTED),
        gold=per_row(policy, Role.GOLD),
        gold_length=per_row(batch.lengths, Role.GOLD),
        rows=batch.rows,
        tokens=ResponseTokens(
            pair=batch.pairs[batch.owners],
            role=batch.roles[batch.owners],
            position=torch.arange(len(batch.owners), device=first.device) - first[batch.owners],
            log_prob=tokens.log_prob,
            reference=reference,
            sum_squared=tokens.sum_squared,
            forward_kl=None if tokens.reverse_kl is None else tokens.kl,
            reverse_kl=tokens.reverse_kl,
        ),
        **optional,
    )


def tokens_with_kl(
    batch: PairBatch, states: Tensor, head: Head, reference: tuple[Tensor, Head], moments: bool
) -> TokenLogProbs:
    """All tokens' values, and the KL to the reference of the reference samples' (0 elsewhere)."""
    sampled = batch.roles[batch.owners] == Role.REFERENCE_SAMPLE
    N, reference_states, reference_head = len(states), *reference
    values: dict[str, Tensor] = {}
    for part, against in (
        (~sampled, None),
        (sampled, (reference_states[sampled], reference_head)),
    ):
        index = part.nonzero().squeeze(1)
        found = token_log_probs(
            states[index], head, batch.targets[index], moments=moments, reference=against
        )
        for name in ("log_prob", "sum_squared", "kl"):
            value = getattr(found, name)
            if value is not None:
                whole = values.get(name, value.new_zeros(N))
                values[name] = whole.index_add(0, index, value)
    return TokenLogProbs(**values)
