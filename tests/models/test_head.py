import pytest
import torch
from torch.autograd import gradcheck

from rotopo.models.head import Head, token_kls, token_log_probs

N, D, V = 7, 5, 11


def make(dtype=torch.float64, bias=False, **settings):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator)
    b = torch.randn(V, dtype=torch.float64, generator=generator).to(dtype) if bias else None
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.to(dtype), Head(weight.to(dtype), b, **settings), targets


def plain(hidden, head, targets, reference=None):
    """The definition, on whole logits."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    p = torch.softmax(logits, -1)
    outputs = [p[torch.arange(N), targets].log(), (p**2).sum(-1)]
    if reference is not None:
        q = torch.softmax(reference[0] @ reference[1].weight.T, -1)
        outputs.append((q * (q / p).log()).sum(-1))
    return outputs


heads = pytest.mark.parametrize(
    "settings",
    [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5}],
)


@heads
@pytest.mark.parametrize("tile", [(1, 3), (3, 1), (4, 100), (100, 4)])
def test_values_equal_the_definition(settings, tile):
    hidden, head, targets = make(**settings)
    reference = (torch.randn(N, D, dtype=torch.float64), Head(torch.randn_like(head.weight)))
    found = token_log_probs(hidden, head, targets, moments=True, reference=reference, tile=tile)
    expected = plain(hidden, head, targets, reference)
    for a, b in zip((found.log_prob, found.sum_squared, found.kl), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@heads
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_gradients_equal_autograd_through_the_definition(settings, train_head, extras):
    hidden, head, targets = make(**settings)
    hidden.requires_grad_()
    leaves = [hidden]
    if train_head:
        leaves += [t.requires_grad_() for t in (head.weight, head.bias) if t is not None]
    reference = (torch.randn(N, D, dtype=torch.float64), Head(torch.randn_like(head.weight)))
    if extras:
        found = token_log_probs(
            hidden, head, targets, moments=True, reference=reference, tile=(3, 4)
        )
        outputs = [found.log_prob, found.sum_squared, found.kl]
        expected = plain(hidden, head, targets, reference)
    else:
        outputs = [token_log_probs(hidden, head, targets, tile=(3, 4)).log_prob]
        expected = plain(hidden, head, targets)[:1]
    factors = [torch.randn(N, dtype=torch.float64) for _ in outputs]
    ours = torch.autograd.grad(
        sum((f * o).sum() for f, o in zip(factors, outputs, strict=True)), leaves
    )
    theirs = torch.autograd.grad(
        sum((f * o).sum() for f, o in zip(factors, expected, strict=True)), leaves
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck():
    hidden, head, targets = make(softcap=3.0)
    weight = head.weight.requires_grad_()

    def outputs(h, w):
        found = token_log_probs(h, Head(w, softcap=3.0), targets, moments=True, tile=(3, 4))
        return found.log_prob, found.sum_squared

    assert gradcheck(outputs, (hidden.requires_grad_(), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_accumulate_in_float32(dtype):
    """Beyond the rounding of the logits themselves, nothing is lost in a half type."""
    hidden, head, targets = make(dtype)
    found = token_log_probs(hidden, head, targets).log_prob
    assert found.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, head.weight).double()
    expected = logits.log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_probable_targets_keep_their_small_gradient_in_bfloat16():
    """1 − p is formed before rounding: at p ≈ 0.999 a rounded p would be 1 and the gradient 0."""
    hidden = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    token_log_probs(hidden, Head(weight), torch.tensor([0])).log_prob.sum().backward()
    expected = 1 - torch.sigmoid(torch.tensor(7.0))
    torch.testing.assert_close(hidden.grad.float().squeeze(), expected, rtol=1e-2, atol=0)


def test_no_tokens_are_no_error():
    hidden, head, targets = make()
    leaves = [hidden[:0].requires_grad_(), head.weight.requires_grad_()]
    found = token_log_probs(leaves[0], head, targets[:0], moments=True)
    assert found.log_prob.shape == found.sum_squared.shape == (0,)
    for gradient in torch.autograd.grad(found.log_prob.sum() + found.sum_squared.sum(), leaves):
        assert not gradient.any()


def test_a_flat_distribution_over_a_large_vocabulary_in_float16():
    """The sum of all others' exp(logit - largest) is beyond float16's largest number."""
    hidden = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(100_000, 4).half()
    found = token_log_probs(hidden, Head(weight), torch.tensor([5, 7])).log_prob
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    expected = weight[[5, 7]].float() - weight.float().mean(0)
    torch.testing.assert_close(gradient.float(), expected, rtol=2e-3, atol=2e-3)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    hidden.requires_grad_()
    found = token_log_probs(hidden, Head(weight), torch.tensor([0, 1]), moments=True)
    total = found.log_prob.sum() + found.sum_squared.sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(hidden.grad).all()
    assert found.log_prob.tolist() == [0.0, -1e4]


def dense_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@heads
@pytest.mark.parametrize("tokens", [None, 3])
def test_both_kls_equal_the_definition(settings, tokens):
    hidden, head, _ = make(**settings)
    reference = torch.randn(N, D + 1, dtype=torch.float64)
    other = Head(torch.randn(V, D + 1, dtype=torch.float64))
    forward, reverse = token_kls(hidden, head, reference, other, tokens)
    ours, theirs = (x.log_softmax(-1) for x in (head.logits(hidden), other.logits(reference)))
    torch.testing.assert_close(forward, dense_kl(theirs, ours), rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse, dense_kl(ours, theirs), rtol=0, atol=1e-12)


def test_kls_of_equal_logits_are_0_and_of_near_ones_do_not_drown_in_rounding():
    """Logits of size 20, as models have them, in float32, and KLs of some 1e-8."""
    torch.manual_seed(0)
    weight, hidden = 5 * torch.randn(1000, 16), torch.randn(4, 16)
    head = Head(weight)
    same = token_kls(hidden, head, hidden.clone(), head)
    assert not torch.stack(same).any()
    near = hidden + 1e-5 * torch.randn(4, 16)
    found = torch.stack(token_kls(near, head, hidden, head))
    ours, theirs = ((h.double() @ weight.double().T).log_softmax(-1) for h in (near, hidden))
    expected = torch.stack([dense_kl(theirs, ours), dense_kl(ours, theirs)])
    assert 1e-9 < expected.max() < 1e-7
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=1e-11)


def test_kls_of_distributions_far_apart_are_numbers():
    """e^d alone is beyond float32, and some probabilities are 0."""
    hidden, other = torch.tensor([[300.0], [0.0]]), torch.tensor([[-300.0], [0.0]])
    head = Head(torch.tensor([[1.0], [0.0]]))
    for kl in token_kls(hidden, head, other, head):
        torch.testing.assert_close(kl, torch.tensor([300.0, 0.0]))
