"""Hidden states -> per-token log-probs: the only code that applies the output head.

Training, the reference, evaluation and scoring all come through here. The op works on chunks of
tokens, so that no tensor of shape tokens × vocabulary outlives a chunk.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

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
class PairLogProbs:
    """What objectives are functions of: B pairs, sums over each response's tokens, in nats.

    Attributes:
        chosen, rejected: log π_θ(y_w|x) and log π_θ(y_l|x) [B].
        reference_chosen, reference_rejected: the same under the reference [B], or None for
            objectives that have none.
        chosen_length, rejected_length: response tokens, the end-of-turn token included [B].
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        """Δw = log π_θ(y_w|x) − log π_ref(y_w|x) [B]."""
        return self.chosen - _given(self.reference_chosen)

    @property
    def rejected_log_ratio(self) -> Tensor:
        """Δl = log π_θ(y_l|x) − log π_ref(y_l|x) [B]."""
        return self.rejected - _given(self.reference_rejected)

    def detach(self) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.detach() for k, v in values.items() if v is not None})


def _given(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError(
            "No reference log-probs: an objective that compares with a reference has to declare "
            "needs_reference = True."
        )
    return reference


def pair_log_probs(
    batch: PairBatch, tokens: Tensor, reference_tokens: Tensor | None
) -> PairLogProbs:
    """Sum per-token log-probs [N] over the chosen and the rejected response of each pair."""
    chosen, rejected = batch.responses(Role.CHOSEN), batch.responses(Role.REJECTED)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(batch.lengths)).index_add(0, batch.owners, values)

    policy = total(tokens)
    reference = total(reference_tokens) if reference_tokens is not None else None
    return PairLogProbs(
        chosen=policy[chosen],
        rejected=policy[rejected],
        reference_chosen=reference[chosen] if reference is not None else None,
        reference_rejected=reference[rejected] if reference is not None else None,
        chosen_length=batch.lengths[chosen],
        rejected_length=batch.lengths[rejected],
    )
