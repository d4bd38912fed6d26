"""How far a policy is from its reference over whole responses: sequence KL in both directions.

KL(π_θ ‖ π_ref) = E_{y ~ π_θ} Σ_t KL(π_θ(· | x, y_<t) ‖ π_ref(· | x, y_<t)), and the other way round
over y ~ π_ref. Each is unbiased for responses drawn from that very model at temperature 1 from the
whole distribution, by the weights that are scored, and scored up to and with the token that ends
them. Whole distributions at each token in the place of the one log-ratio of the token that was
drawn: the same mean, a fraction of the variance, and never below zero. Responses that
``max_new_tokens`` cuts are those of a process that stops there, and so is their KL.
"""

from collections.abc import Sequence

import torch

from rotopo.data.batch import Layout, Role, TokenizedRow, collate
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from rotopo.models.log_probs import given
from rotopo.models.modes import evaluating
from rotopo.models.policy import Policy
from rotopo.models.samples import in_parts, responses_to
from rotopo.models.settings import Sampling


def drawn_responses(
    policy: Policy,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    encoder: PairEncoder,
    seed: int = 0,
) -> list[list[int]]:
    """A response of the policy to each prompt, at temperature 1 from the whole distribution.

    Args:
        policy: who responds.
        prompts: token ids; one that is there several times gets as many responses.
        max_new_tokens: tokens of a response at most.
        encoder: how prompts became tokens.
        seed: of the draws; each response has random numbers of its own, by the seed and its place.

    Returns:
        token ids, with the end-of-turn token where a response ended.
    """
    sampling = Sampling(max_new_tokens, temperature=1.0, seed=seed)
    drawn: list[list[int]] = [[] for _ in prompts]
    for part in in_parts(prompts):
        responses = responses_to(policy, prompts, part, sampling, encoder)
        for place, response in zip(part, responses, strict=True):
            drawn[place] = response
    return drawn


@torch.no_grad()
def response_kls(
    policy: Policy,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    pad_id: int,
    layout: Layout = "packed",
    tokens_at_once: int = 4096,
) -> torch.Tensor:
    """Sums over each response's tokens of both KLs between whole next-token distributions.

    Args:
        policy: which has a reference of its vocabulary.
        prompts: token ids, one for each response.
        responses: token ids, each of at least one.
        pad_id: of the padding.
        layout: how they are laid out.
        tokens_at_once: of prompts and responses in a batch, about.

    Returns:
        KL(π_ref ‖ π_θ) and KL(π_θ ‖ π_ref), nats, float64 on the CPU [n, 2]. The mean of the first
        estimates the forward KL where the responses are the reference's, that of the second the
        reverse KL where they are the policy's.

    Raises:
        InputError: policy and reference have other vocabularies.
    """
    rows = [
        TokenizedRow(prompt, [response], [Role.CHOSEN], number)
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    # Of like length together, which is less padding in the padded layout.
    rows.sort(key=lambda row: len(row.prompt) + len(row.responses[0]))
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    with evaluating(policy.model):
        while rows:
            longest = len(rows[-1].prompt) + len(rows[-1].responses[0])
            n = max(1, tokens_at_once // longest)
            part, rows = rows[-n:], rows[:-n]
            batch = collate(part, pad_id, layout, 1.0).to(policy.device)
            tokens = given(policy(batch, compared=True).tokens, "tokens")
            if tokens.forward_kl is None or tokens.reverse_kl is None:
                raise InputError(
                    "policy.reference has another vocabulary than the policy: there is no KL "
                    "between their distributions."
                )
            kls = torch.stack([tokens.forward_kl, tokens.reverse_kl], 1)
            found.index_add_(0, batch.rows[tokens.pair].cpu(), kls.double().cpu())
    return found
