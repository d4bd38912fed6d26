"""Hidden states -> per-token log-probs: the only code that applies the output head.

Training, the reference, evaluation and scoring all come through here. The op works on chunks of
tokens, so that no tensor of shape tokens × vocabulary outlives a chunk.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotopo.data.batch import PairBatch, Role

# Logits of one chunk: large enough to keep the cores busy, small enough to stay near them.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Head:
    """Output head: logits = softcap·tanh(scale·(h Wᵀ + bias) / softcap).

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        scale: factor on the logits (Cohere's, Granite's); 1 for most families.
        softcap: bound on the logits (Gemma 2's) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], in at least float32."""
        raw = F.linear(hidden, self.weight, self.bias)
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits


@dataclass(frozen=True)
class TokenLogProbs:
    """Per response token, all [N], in at least float32.

    Attributes:
        log_prob: log π(target | what precedes it), nats.
        sum_squared: Σ_v p_v² of the next-token distribution.
        entropy: −Σ_v p_v log p_v, nats.
        kl: KL(π_ref ‖ π_θ) of the next-token distributions, nats.
    """

    log_prob: Tensor
    sum_squared: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None


def token_log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    moments: bool = False,
    reference: tuple[Tensor, Head] | None = None,
    chunk_tokens: int | None = None,
) -> TokenLogProbs:
    """Log-probs of the targets, without keeping the logits.

    Gradients reach the hidden states, the head's weight and its bias, from every output. Matrix
    products run in the head's dtype, everything after them in at least float32 (float64 stays).

    Args:
        hidden: the hidden state that predicts each target [N, D].
        head: the output head.
        targets: token ids [N].
        moments: also return ``sum_squared`` and ``entropy``.
        reference: hidden states [N, D] and head of the reference, for ``kl``; no gradient.
        chunk_tokens: tokens whose logits exist at once; None sizes it by the vocabulary.
    """
    if chunk_tokens is None:
        elements = _CHUNK_ELEMENTS["cuda" if hidden.is_cuda else "cpu"]
        chunk_tokens = max(1, elements // head.weight.shape[0])
    reference_hidden, reference_head = reference if reference is not None else (None, None)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = _FusedHead.apply(
            hidden.to(head.weight.dtype),
            head.weight,
            head.bias,
            targets,
            head,
            moments,
            reference_hidden,
            reference_head,
            chunk_tokens,
        )
    return TokenLogProbs(*outputs)


class _FusedHead(torch.autograd.Function):
    """Outputs (log_prob, sum_squared, entropy, kl); see :func:`token_log_probs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        moments: bool,
        reference_hidden: Tensor | None,
        reference_head: Head | None,
        chunk_tokens: int,
    ) -> tuple[Tensor | None, ...]:
        # A log-prob alone, over a frozen head: its gradient with respect to the hidden state is
        # one vector per token up to the incoming factor, so it is made here and the backward
        # pass need not compute the logits again.
        plain = not moments and reference_hidden is None
        eager = plain and ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        columns: list[list[Tensor]] = []
        jacobian = torch.empty_like(hidden) if eager else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = head.logits(hidden[part])
            p, log_z = _softmax(logits)
            column = [(logits.gather(1, targets[part, None]) - log_z).squeeze(1)]
            if jacobian is not None:
                one_hot_minus_p = p.neg_()
                one_hot_minus_p[torch.arange(len(column[0])), targets[part]] += 1
                jacobian[part] = _through_head(one_hot_minus_p, logits, head) @ weight
            elif not plain:
                log_p = logits - log_z
                if moments:
                    column += [p.square().sum(-1), -(p * log_p).sum(-1)]
                if reference_hidden is not None and reference_head is not None:
                    reference_logits = reference_head.logits(reference_hidden[part])
                    q, log_z = _softmax(reference_logits)
                    column.append((q * (reference_logits - log_z - log_p)).sum(-1))
            columns.append(column)
        outputs: list[Tensor | None] = [torch.cat(c) for c in zip(*columns, strict=True)]
        if not moments:
            outputs[1:1] = [None, None]
        if reference_hidden is None:
            outputs.append(None)

        ctx.eager, ctx.head, ctx.moments = eager, head, moments
        ctx.reference_head, ctx.chunk_tokens = reference_head, chunk_tokens
        if eager:
            ctx.save_for_backward(jacobian)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, reference_hidden)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        g_log_prob: Tensor | None,
        g_squared: Tensor | None,
        g_entropy: Tensor | None,
        g_kl: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if ctx.eager:
            (jacobian,) = ctx.saved_tensors
            assert g_log_prob is not None
            return (g_log_prob.to(jacobian.dtype)[:, None] * jacobian, None, None, *nothing)

        hidden, weight, bias, targets, reference_hidden = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # The sum over chunks is kept in float32; half types would lose the small terms.
        wide = torch.promote_types(weight.dtype, torch.float32)
        g_hidden = torch.empty_like(hidden) if need_hidden else None
        g_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        g_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        for start in range(0, len(targets), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = head.logits(hidden[part])
            p, log_z = _softmax(logits)
            g_logits = torch.zeros_like(p)
            if g_log_prob is not None:
                g = g_log_prob[part, None]
                g_logits -= g * p
                g_logits.scatter_add_(1, targets[part, None], g)
            if ctx.moments and g_squared is not None:
                g_logits += g_squared[part, None] * 2 * p * (p - p.square().sum(-1, keepdim=True))
            if ctx.moments and g_entropy is not None:
                log_p = logits - log_z
                entropy = -(p * log_p).sum(-1, keepdim=True)
                g_logits -= g_entropy[part, None] * p * (log_p + entropy)
            if reference_hidden is not None and g_kl is not None:
                q, _ = _softmax(ctx.reference_head.logits(reference_hidden[part]))
                g_logits += g_kl[part, None] * (p - q)
            g_raw = _through_head(g_logits, logits, head)
            if g_hidden is not None:
                g_hidden[part] = g_raw @ weight
            if g_weight is not None:
                g_weight += g_raw.T @ hidden[part]
            if g_bias is not None:
                g_bias += g_raw.sum(0)
        if g_weight is not None:
            g_weight = g_weight.to(weight.dtype)
        if g_bias is not None:
            g_bias = g_bias.to(bias.dtype)
        return (g_hidden, g_weight, g_bias, *nothing)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p [N, V] and log Σ exp(logits) [N, 1].

    torch's own kernels add the vocabulary up one by one on a CPU: in float32 that moves every
    log-prob by about 1e-5, all to the same side, at V = 49,152. Its sum() adds pairwise.
    """
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), top + total.log()


def _through_head(g_logits: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Gradient with respect to h Wᵀ + bias, in the weight's dtype, from that of the logits."""
    if head.softcap is not None:
        g_logits = g_logits * (1 - (logits / head.softcap).square())
    if head.scale != 1.0:
        g_logits = g_logits * head.scale
    return g_logits.to(head.weight.dtype)


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the policy and of the data.

    Attributes:
        reference: log-probs under the reference.
        pairs: both responses in every row; objectives without it also take rows with one.
        moments: Σp² of every next-token distribution (WPO's weights).
        roles: responses beside the chosen and the rejected. With ``REFERENCE_SAMPLE`` comes
            KL(π_ref ‖ π_θ) along that response.
    """

    reference: bool = True
    pairs: bool = True
    moments: bool = False
    roles: tuple[Role, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.reference or other.reference,
            self.pairs or other.pairs,
            self.moments or other.moments,
            tuple(sorted({*self.roles, *other.roles})),
        )


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
    """

    pair: Tensor
    role: Tensor
    position: Tensor
    log_prob: Tensor
    reference: Tensor | None = None
    sum_squared: Tensor | None = None

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
    return replace(values, **{k: v.detach() for k, v in parts.items() if v is not None})


def given(value: T | None, name: str) -> T:
    """A field of :class:`PairLogProbs`, or an error that says how to get it."""
    if value is None:
        raise ValueError(
            f"The log-probs hold no {name}: an objective says in its `needs` what it works on."
        )
    return value


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
        roles: :attr:`Needs.roles`; mismatched responses are picked out only for who asks, since
            picking waits for a GPU.
    """
    S, B = len(batch.roles), batch.n_pairs
    first = batch.lengths.cumsum(0) - batch.lengths

    def per_response(values: Tensor) -> Tensor:
        return values.new_zeros(S).index_add(0, batch.owners, values)

    def per_row(values: Tensor, role: Role) -> Tensor:
        return sum_of_role(values, role, batch.roles, batch.pairs, B)

    policy = per_response(tokens.log_prob)
    optional: dict[str, Tensor] = {}
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
        ),
        **optional,
    )
