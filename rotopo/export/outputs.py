"""What a model says of the probes: the trained module, and what was written of it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotopo.data.batch import collate
from rotopo.export.job import Job
from rotopo.models.policy import Policy
from rotopo.models.scorer import Scorer


def policy_logits(policy: Policy, job: Job) -> list[Tensor]:
    """The policy's own logits of each response of the probes [positions, V]."""
    found = []
    for probe in job.probes:
        batch = collate([probe.row], job.data.pad_id, job.data.batching.layout, 1.0)
        predictors = batch.predictors.split(batch.lengths.tolist())
        for places, positions in zip(predictors, probe.positions(), strict=True):
            found.append(policy.logits(batch, places[positions]))
    return found


@torch.no_grad()
def scorer_rewards(scorer: Scorer, job: Job) -> tuple[list[Tensor], float]:
    """The scorer's own rewards of each response of the probes [1], and their scale.

    A reward may be near zero: its scale is what a head of this norm makes of unrelated states of
    this norm.
    """
    head: Any = scorer.language_model.score
    sizes = []

    def see(head: Any, states: tuple[Tensor]) -> None:
        sizes.append(float(states[0].norm(dim=-1).max()))

    found: list[Tensor] = []
    hook = head.register_forward_pre_hook(see)
    try:
        for probe in job.probes:
            # Behind every response a token that is never read.
            responses = [[*ids, job.data.pad_id] for ids in probe.row.responses]
            row = replace(probe.row, responses=responses)
            found += scorer(collate([row], job.data.pad_id, job.data.batching.layout, 1.0)).split(1)
    finally:
        hook.remove()
    return found, max(sizes) * float(head.weight.norm()) / head.in_features**0.5


@torch.no_grad()
def written_outputs(model: Any, job: Job) -> list[Tensor]:
    """The same of a model of transformers or PEFT alone."""
    found = []
    for probe in job.probes:
        for ids, positions in zip(probe.row.responses, probe.positions(), strict=True):
            if job.kind == "reward":
                tokens = torch.tensor([probe.row.prompt + ids])
                found.append(model(input_ids=tokens, use_cache=False).logits[0])
            else:
                tokens = torch.tensor([probe.row.prompt + ids[:-1]])
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                found.append(logits[len(probe.row.prompt) - 1 + positions])
    return found


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Between outputs of the same shapes; not a number where one of them is none."""
    # By torch, whose maximum is not a number where one of the values is not.
    largest = [(x - y).abs().max() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(largest).max())
