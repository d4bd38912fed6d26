"""Hidden states -> per-token log-probs: the only code that applies the output head.

Training, the reference, evaluation and scoring all come through here. The op works on tiles of
some tokens × some of the vocabulary, small enough to stay in a processor's cache, and carries the
softmax from tile to tile; so its memory grows with neither tokens × vocabulary nor the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens of a tile, and logits of it, by the kind of device.
_TILE = {"cpu": (512, 2**20), "cuda": (8192, 2**26)}
# Logits of a tile in which whole distributions are compared.
_COMPARED = {"cpu": 2**22, "cuda": 2**25}


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

    def part(self, entries: slice) -> "Head":
        """The head of a part of the vocabulary."""
        bias = None if self.bias is None else self.bias[entries]
        return replace(self, weight=self.weight[entries], bias=bias)

    def detached(self) -> "Head":
        """The head as it is now, of parameters whose values may be exchanged for others."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], in at least float32; a tensor of its own."""
        raw = F.linear(hidden, self.weight, self.bias)
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True)
class TokenLogProbs:
    """Per response token, all [N], in at least float32.

    Attributes:
        log_prob: log π(target | what precedes it), nats.
        sum_squared: Σ_v p_v² of the next-token distribution.
        kl: KL(π_ref ‖ π_θ) of the next-token distributions, nats.
        reverse_kl: KL(π_θ ‖ π_ref) likewise, without gradient.
    """

    log_prob: Tensor
    sum_squared: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None


def token_log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    moments: bool = False,
    reference: tuple[Tensor, Head] | None = None,
    tile: tuple[int, int] | None = None,
) -> TokenLogProbs:
    """Log-probs of the targets, without keeping the logits.

    Gradients reach the hidden states, the head's weight and its bias, from every output. Matrix
    products run in the head's dtype, everything after them in at least float32 (float64 stays).

    Args:
        hidden: the hidden state that predicts each target [N, D].
        head: the output head.
        targets: token ids [N].
        moments: also return ``sum_squared``.
        reference: hidden states [N, D] and head of the reference, for ``kl``; no gradient.
        tile: tokens and entries of the vocabulary whose logits exist at once; None chooses.
    """
    if tile is None:
        tokens, elements = _TILE["cuda" if hidden.is_cuda else "cpu"]
        tokens = max(1, min(tokens, len(targets)))
        tile = tokens, max(1, elements // tokens)
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
            tile,
        )
    return TokenLogProbs(*outputs)


@torch.no_grad()
def token_kls(
    hidden: Tensor, head: Head, reference: Tensor, reference_head: Head, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both KLs between policy and reference of each next-token distribution, without gradient.

    As Σ p (e^d − 1 − d) with d = log q − log p, which is KL(p ‖ q) because Σ p e^d is 1: no term is
    below zero, so small KLs do not come from a difference of large sums, and where both have the
    same logits the KL is 0.

    Args:
        hidden: the policy's hidden state before each token [N, D].
        head: its output head.
        reference: the reference's hidden states [N, D'].
        reference_head: its output head, of the same V.
        tokens: whose logits [tokens, V] exist at once; None chooses.

    Returns:
        KL(π_ref ‖ π_θ) and KL(π_θ ‖ π_ref), nats, each [N], in at least float32.
    """
    if tokens is None:
        tokens = max(1, _COMPARED["cuda" if hidden.is_cuda else "cpu"] // len(head.weight))
    forward, reverse = [], []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, max(1, len(hidden)), tokens):
            part = slice(start, start + tokens)
            ours, theirs = (
                h.logits(states[part].to(h.weight.dtype)).log_softmax(-1)
                for states, h in ((hidden, head), (reference, reference_head))
            )
            reverse.append(_kl(ours, theirs))
            forward.append(_kl(theirs, ours))
    return torch.cat(forward), torch.cat(reverse)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row of log-probs [n, V] -> [n]."""
    p = log_p.exp()
    # An entry that both rule out, by a logit of -inf, is no difference.
    d = (log_q - log_p).nan_to_num_()
    near = p * (d.expm1() - d)
    # Where the entries are far apart e^d may be too large a number, and nothing cancels.
    return torch.where(d < 1, near, log_q.exp() - p - p * d).sum(-1)


class _FusedHead(torch.autograd.Function):
    """Outputs (log_prob, sum_squared, kl); see :func:`token_log_probs`."""

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
        tile: tuple[int, int],
    ) -> tuple[Tensor | None, ...]:
        # A log-prob alone, over a frozen head: its gradient with respect to the hidden state is
        # one vector per token up to the incoming factor, so it is made here and the backward
        # pass need not compute the logits again.
        plain = not moments and reference_hidden is None
        eager = plain and ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        scans = []
        for start in range(0, max(1, len(targets)), tile[0]):
            part = slice(start, start + tile[0])
            reference = None
            if reference_hidden is not None and reference_head is not None:
                reference = reference_hidden[part], reference_head
            scans.append(
                _scan(hidden[part], head, targets[part], tile[1], moments, reference, eager)
            )
        parts: Any = (None if c[0] is None else torch.cat(c) for c in zip(*scans, strict=True))
        found = _Scan(*parts)
        ctx.eager, ctx.head, ctx.reference_head, ctx.tile = eager, head, reference_head, tile
        if eager:
            ctx.save_for_backward(found.jacobian)
        else:
            ctx.save_for_backward(
                hidden,
                weight,
                bias,
                targets,
                reference_hidden,
                found.log_z,
                found.sum_squared,
                found.reference_log_z,
            )
        return found.log_prob, found.sum_squared, found.kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_log_prob: Tensor, g_squared: Tensor | None, g_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if ctx.eager:
            (jacobian,) = ctx.saved_tensors
            return (g_log_prob.to(jacobian.dtype)[:, None] * jacobian, None, None, *nothing)

        hidden, weight, bias, targets, reference_hidden, *saved = ctx.saved_tensors
        # All as columns [N, 1], to go with [N, V].
        values = (*saved, g_log_prob, g_squared, g_kl)
        columns: Any = (None if value is None else value[:, None] for value in values)
        log_z, sum_squared, reference_log_z, g_log_prob, g_squared, g_kl = columns
        head = replace(ctx.head, weight=weight, bias=bias)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # Sums over tiles are kept in float32; half types would lose the small terms.
        wide = torch.promote_types(weight.dtype, torch.float32)
        g_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        g_weight = torch.empty_like(weight) if need_weight else None
        g_bias = torch.empty_like(bias) if need_bias and bias is not None else None

        # With respect to a logit, by the chain rule: p × (what the token says + what the entry
        # says) − KL's q, and the log-prob's own factor on the target.
        of_token = -g_log_prob
        if g_kl is not None:
            of_token = of_token + g_kl
        if g_squared is not None:
            of_token = of_token - 2 * g_squared * sum_squared
        n_tokens, n_entries = ctx.tile
        for first in range(0, len(weight), n_entries):
            entries = slice(first, first + n_entries)
            part_head = head.part(entries)
            of_weight: Tensor | None = None
            of_bias: Tensor | None = None
            for start in range(0, max(1, len(targets)), n_tokens):
                part = slice(start, start + n_tokens)
                logits = part_head.logits(hidden[part])
                p = (logits - log_z[part]).exp_()
                if g_squared is None:
                    g_logits = p.mul_(of_token[part])
                else:
                    of_entry = 2 * g_squared[part] * p
                    g_logits = of_entry.add_(of_token[part]).mul_(p)
                if g_kl is not None:
                    other = ctx.reference_head.part(entries).logits(reference_hidden[part])
                    q = other.sub_(reference_log_z[part]).exp_()
                    g_logits.addcmul_(q, g_kl[part], value=-1)
                place, inside = _place(targets[part], first, logits.shape[1])
                g_logits.scatter_add_(1, place, torch.where(inside, g_log_prob[part], 0))
                g_raw = _through_head(g_logits, logits, head).to(weight.dtype)
                if g_hidden is not None:
                    g_hidden[part] += g_raw @ part_head.weight
                if g_weight is not None and len(targets) <= n_tokens:
                    torch.mm(g_raw.T, hidden, out=g_weight[entries])
                elif g_weight is not None:
                    of_weight = _added(of_weight, (g_raw.T @ hidden[part]).to(wide))
                if g_bias is not None:
                    of_bias = _added(of_bias, g_raw.sum(0, dtype=wide))
            if g_weight is not None and of_weight is not None:
                g_weight[entries] = of_weight
            if g_bias is not None and of_bias is not None:
                g_bias[entries] = of_bias
        if g_hidden is not None:
            g_hidden = g_hidden.to(hidden.dtype)
        return (g_hidden, g_weight, g_bias, *nothing)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


class _Scan(NamedTuple):
    """What one pass over the vocabulary finds for N tokens, all [N] but the jacobian [N, D]."""

    log_prob: Tensor
    log_z: Tensor
    sum_squared: Tensor | None = None
    kl: Tensor | None = None
    reference_log_z: Tensor | None = None
    jacobian: Tensor | None = None


def _scan(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    n_entries: int,
    moments: bool,
    reference: tuple[Tensor, Head] | None,
    jacobian: bool,
) -> _Scan:
    """The softmax over the vocabulary, tile by tile, with what depends on it.

    Sums run over e = exp(logit - top), top the largest logit so far, and shrink when top grows.
    The target is left out of them until the end: with p near 1, 1 - p is what its gradient
    consists of, and it must not come from a difference.
    """
    N = len(targets)
    wide = torch.promote_types(head.weight.dtype, torch.float32)

    def column(value: float = 0.0) -> Tensor:
        return torch.full((N, 1), value, dtype=wide, device=hidden.device)

    lowest = torch.finfo(wide).min / 4  # not -inf: less a tile's -inf it would be no number
    top, others, squares, at_target = column(lowest), column(), column(), column()
    away = torch.zeros_like(hidden, dtype=wide) if jacobian else None
    reference_top, reference_total, gap = column(lowest), column(), column()
    for first in range(0, len(head.weight), n_entries):
        entries = slice(first, first + n_entries)
        part = head.part(entries)
        logits = part.logits(hidden)
        if reference is not None:
            reference_logits = reference[1].part(entries).logits(reference[0])
            difference = reference_logits - logits
            reference_top, shrink = _raised(reference_top, reference_logits)
            e = reference_logits.sub_(reference_top).exp_()
            reference_total = shrink * reference_total + e.sum(-1, keepdim=True)
            gap = shrink * gap + difference.mul_(e).sum(-1, keepdim=True)
        place, inside = _place(targets, first, logits.shape[1])
        at_target = torch.where(inside, logits.gather(1, place), at_target)
        top, shrink = _raised(top, logits)
        kept = logits.clone() if away is not None and head.softcap is not None else logits
        e = logits.sub_(top).exp_()
        e.scatter_(1, place, torch.where(inside, 0, e.gather(1, place)))
        if moments:
            squares = shrink.square() * squares + e.square().sum(-1, keepdim=True)
        if away is not None:
            away.mul_(shrink).add_(_through_head(e, kept, head).to(part.weight.dtype) @ part.weight)
        others = shrink * others + e.sum(-1, keepdim=True)

    e = (at_target - top).exp()
    total = others + e
    log_total = total.log()
    log_z = top + log_total
    found = {"log_prob": at_target - top - log_total, "log_z": log_z}
    if moments:
        found["sum_squared"] = (squares + e.square()) / total.square()
    if reference is not None:
        found["reference_log_z"] = reference_top + reference_total.log()
        found["kl"] = gap / reference_total - found["reference_log_z"] + log_z
    columns = {name: value.squeeze(1) for name, value in found.items()}
    if away is not None:
        own = _through_head(others, at_target, head) * head.weight[targets]
        columns["jacobian"] = ((own - away) / total).to(hidden.dtype)
    return _Scan(**columns)


def _raised(top: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit so far [N, 1], and what sums relative to the last one shrink by."""
    raised = torch.maximum(top, logits.amax(-1, keepdim=True))
    return raised, (top - raised).exp()


def _place(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Each target's place in a part of the vocabulary, and whether it is there, both [N, 1]."""
    place = targets[:, None] - first
    return place.clamp(0, size - 1), (place >= 0) & (place < size)


def _through_head(g_logits: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Gradient with respect to h Wᵀ + bias from that of the logits."""
    if head.softcap is not None:
        g_logits = g_logits * (1 - (logits / head.softcap).square())
    if head.scale != 1.0:
        g_logits = g_logits * head.scale
    return g_logits
