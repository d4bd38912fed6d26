"""What objectives are computed from, by its definition, for every role a response can have."""

import pytest
import torch
from peft import LoraConfig

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.models.policy import Policy, PolicyConfig
from tests.models.families import make

C, R, M, S, G = Role.CHOSEN, Role.REJECTED, Role.MISMATCHED, Role.REFERENCE_SAMPLE, Role.GOLD
# Pairs and single responses, with and without others beside them, in any order.
ROWS = [
    TokenizedRow([5, 6, 7], [[8, 9, 2], [10, 2], [11, 12, 13, 2]], [C, R, S], 40),
    TokenizedRow([14], [[15, 2], [16, 17, 2]], [M, C], 7),
    TokenizedRow([18, 19], [[20, 21], [22, 23, 2], [24, 2], [25, 2]], [G, R, M, M], 3),
    TokenizedRow([26, 27], [[28, 2], [29], [30, 31, 32, 2], [33, 2]], [S, C, R, G], 12),
]
NEEDS = Needs(moments=True, roles=(M, S, G))
layouts = pytest.mark.parametrize("layout", ["padded", "shared_prompt", "packed"])


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    config = PolicyConfig(path="", adapter=adapter)
    policy = Policy.build(make("llama"), config, needs_reference=True).eval()
    policy.start = None  # as if the adapter had been trained to its random values
    return policy


def log_p(policy: Policy, row: TokenizedRow, response: list[int]) -> torch.Tensor:
    """log π of every next token [|response|, V], by the Hugging Face model alone."""
    logits = policy.model(input_ids=torch.tensor([row.prompt + response])).logits[0]
    return logits[len(row.prompt) - 1 : -1].log_softmax(-1)


def by_definition(policy: Policy, value) -> dict[Role, torch.Tensor]:
    """Sums over the responses of each role [B], of value(log π_θ, log π_ref, response)."""
    sums = {role: torch.zeros(len(ROWS), dtype=torch.float64) for role in Role}
    for i, row in enumerate(ROWS):
        for response, role in zip(row.responses, row.roles, strict=True):
            theta = log_p(policy, row, response)
            with policy.model.disable_adapter():
                reference = log_p(policy, row, response)
            sums[role][i] += value(theta, reference, response).sum()
    return sums


@layouts
@torch.no_grad()
def test_sums_lengths_and_kl_are_those_of_each_role(policy, layout):
    found = policy(collate(ROWS, 0, layout, 1.0), NEEDS)

    def picked(log_probs, response):
        return log_probs[range(len(response)), response]

    theta = by_definition(policy, lambda t, _, response: picked(t, response))
    base = by_definition(policy, lambda _, b, response: picked(b, response))
    kl = by_definition(policy, lambda t, b, _: (b.exp() * (b - t)).sum(-1))
    lengths = by_definition(policy, lambda t, _, __: t.new_ones(len(t)))
    expected = {
        "chosen": theta[C],
        "rejected": theta[R],
        "reference_chosen": base[C],
        "reference_rejected": base[R],
        "chosen_length": lengths[C].long(),
        "rejected_length": lengths[R].long(),
        "gold": theta[G],
        "gold_length": lengths[G].long(),
        "reference_kl": kl[S],
        "rows": torch.tensor([40, 7, 3, 12]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-10, atol=1e-10)
    ratios = found.mismatched_log_ratio
    assert ratios.shape == (3,)
    torch.testing.assert_close(ratios.sum(), (theta[M] - base[M]).sum(), rtol=1e-10, atol=1e-10)
    assert found.has_chosen.tolist() == [True, True, False, True]
    assert found.has_rejected.tolist() == [True, False, True, True]


@layouts
@torch.no_grad()
def test_tokens_know_their_pair_role_place_and_distribution(policy, layout):
    tokens = policy(collate(ROWS, 0, layout, 1.0), NEEDS).tokens
    expected = [
        (i, role, place, log_p(policy, row, response)[place])
        for i, row in enumerate(ROWS)
        for response, role in zip(row.responses, row.roles, strict=True)
        for place in range(len(response))
    ]
    assert tokens.pair.tolist() == [i for i, *_ in expected]
    assert tokens.role.tolist() == [role for _, role, *_ in expected]
    assert tokens.position.tolist() == [place for _, _, place, _ in expected]
    squared = torch.stack([log_probs.exp().square().sum() for *_, log_probs in expected])
    torch.testing.assert_close(tokens.sum_squared, squared, rtol=1e-10, atol=1e-10)


@layouts
def test_weighted_sums_are_of_the_weighted_tokens(policy, layout):
    log_probs = policy(collate(ROWS, 0, layout, 1.0), NEEDS)
    tokens = log_probs.tokens
    weights = torch.rand(len(tokens.position), dtype=torch.float64)
    found = log_probs.weighted(weights)
    for name, role, values in (
        ("chosen", C, tokens.log_prob),
        ("rejected", R, tokens.log_prob),
        ("reference_chosen", C, tokens.reference),
        ("reference_rejected", R, tokens.reference),
    ):
        for i in range(len(ROWS)):
            mine = (tokens.pair == i) & (tokens.role == role)
            expected = (weights * values)[mine].sum()
            torch.testing.assert_close(getattr(found, name)[i], expected)
    same = log_probs.weighted(torch.ones_like(weights))
    torch.testing.assert_close(same.chosen, log_probs.chosen)


@layouts
def test_only_the_policys_own_log_probs_and_kl_have_a_gradient(policy, layout):
    found = policy(collate(ROWS, 0, layout, 1.0), NEEDS)
    for name in ("chosen", "rejected", "gold", "reference_kl"):
        assert getattr(found, name).requires_grad, name
    for name in ("reference_chosen", "reference_rejected", "mismatched_log_ratio"):
        assert not getattr(found, name).requires_grad, name
    assert not found.detach().tokens.log_prob.requires_grad


def test_the_kls_gradient_is_that_of_its_definition(policy):
    parameters = [p for p in policy.parameters() if p.requires_grad]
    found = policy(collate(ROWS, 0, "packed", 1.0), NEEDS).reference_kl.sum()
    expected = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        for response, role in zip(row.responses, row.roles, strict=True):
            if role == S:
                with torch.no_grad(), policy.model.disable_adapter():
                    reference = log_p(policy, row, response)
                theta = log_p(policy, row, response)
                expected = expected + (reference.exp() * (reference - theta)).sum()
    for a, b in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_needs_add_up():
    a, b = Needs(reference=False, pairs=False, roles=(G,)), Needs(moments=True, roles=(M, G))
    assert a | b == Needs(reference=True, pairs=True, moments=True, roles=(M, G))
    assert Needs(reference=False) | Needs(reference=False) == Needs(reference=False)
