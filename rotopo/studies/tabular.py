"""The smallest preference problem: one prompt, K responses of one token, a softmax policy.

Its population can be written down, so that what an objective asks for is known up to rounding. The
losses are those that training uses: a module's ``losses`` on
:class:`~rotopo.models.log_probs.PairLogProbs`, of which every row is one labelled pair. The
population is a table of rows in which every ordered pair occurs as often as the true preferences
say: also objectives that compare the rows of a batch (Dr. DPO, AOT) see it as it is.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs, ResponseTokens, given
from rotopo.objectives import Mixture
from rotopo.objectives.base import PreferenceModule, positive
from rotopo.studies.minimise import Minimum, minimise

Convention = Literal["ordered_pairs", "labelled_pairs", "official"]

_MOST_ROWS = 20_000
_ROUNDS = 50  # of the search for a fixed point
_SETTLED = 1e-6  # total variation between two of its rounds
_TIE = 1e-10  # losses that are the same


@dataclass(frozen=True)
class Prompt:
    """What is true of a prompt.

    Attributes:
        true: π*, of which the labels are drawn by Bradley and Terry's model,
            p*(i ≻ j) = π*_i/(π*_i + π*_j) [K].
        reference: π_ref [K].
    """

    true: Tensor
    reference: Tensor

    @classmethod
    def of(cls, true: Sequence[float], reference: Sequence[float]) -> "Prompt":
        """Check and convert.

        Raises:
            InputError: not two distributions over the same K ≥ 2 responses, all above zero.
        """
        for name, values in (("true", true), ("reference", reference)):
            if min(values, default=0) <= 0 or not math.isclose(sum(values), 1, abs_tol=1e-9):
                raise InputError(
                    f"{name} is {values}: give probabilities above zero that add up to 1."
                )
        if len(true) != len(reference) or len(true) < 2:
            raise InputError(
                f"true has {len(true)} responses and reference {len(reference)}: give the same "
                "number of both, two at least."
            )
        return cls(
            torch.tensor(true, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
        )

    @property
    def mode(self) -> Tensor:
        """π^δ, the point mass on the mode of π* [K]."""
        return torch.nn.functional.one_hot(self.true.argmax(), len(self.true)).to(self.true)


@dataclass(frozen=True)
class Rows:
    """Labelled pairs of one prompt, and what is known beside them.

    Attributes:
        prompt: where they come from.
        chosen, rejected: index of each row's responses [B].
        reference_samples: how often each response occurs among the reference's samples [K]; exact
            or counted, adding up to 1.
        gold: the same of gold responses [K], drawn from π* [ours].
        convention: as in :func:`population`.
    """

    prompt: Prompt
    chosen: Tensor
    rejected: Tensor
    reference_samples: Tensor
    gold: Tensor
    convention: Convention

    def log_probs(self, policy: Tensor, held: Tensor, needs: Needs) -> PairLogProbs:
        """The rows under a policy, every response one token long.

        Args:
            policy: log π_θ [K].
            held: log π of the policy at which everything is computed that training takes as
                constant: KTO's mismatched responses, the tokens that WPO weighs by [K].
            needs: of the objective.
        """
        fixed, B = self._fixed, len(self.chosen)
        reference = self.prompt.reference.log()
        kl = self.reference_samples @ (reference - policy)
        # Half of the mean over rows plus λ·KL has the minimiser of that mean plus 2λ·KL.
        kl = kl / (arms(self.prompt, self.convention) * self.share)
        return replace(
            fixed,
            chosen=policy[self.chosen],
            rejected=policy[self.rejected],
            mismatched_log_ratio=(held - reference)[self._responses],
            gold=(self.gold @ policy).expand(B),
            reference_kl=kl.expand(B),
            tokens=replace(
                given(fixed.tokens, "tokens"),
                log_prob=(held if needs.moments else policy)[self._responses],
                sum_squared=held.exp().square().sum().expand(2 * B),
            ),
        )

    @property
    def share(self) -> float:
        """How much of the mean over rows the loss is."""
        return 0.5 if self.convention == "ordered_pairs" else 1.0

    @cached_property
    def _responses(self) -> Tensor:
        """The response of each token, those of the chosen first [2B]."""
        return torch.cat([self.chosen, self.rejected])

    @cached_property
    def _fixed(self) -> PairLogProbs:
        """What does not depend on the policy; the policy's log-probs are the reference's here."""
        B, one = len(self.chosen), torch.ones_like(self.chosen)
        reference = self.prompt.reference.log()
        return PairLogProbs(
            chosen=reference[self.chosen],
            rejected=reference[self.rejected],
            chosen_length=one,
            rejected_length=one,
            reference_chosen=reference[self.chosen],
            reference_rejected=reference[self.rejected],
            gold_length=one,
            rows=torch.arange(B),
            tokens=ResponseTokens(
                pair=torch.arange(B).repeat(2),
                role=torch.tensor([Role.CHOSEN, Role.REJECTED]).repeat_interleave(B),
                position=torch.zeros_like(self._responses),
                log_prob=reference[self._responses],
                reference=reference[self._responses],
            ),
        )


def population(prompt: Prompt, convention: Convention = "ordered_pairs") -> Rows:
    """Every pair of responses equally often, labelled in exact proportion.

    Args:
        prompt: with π* in fractions.
        convention: ``ordered_pairs`` divides the sum over ordered pairs of p*(i ≻ j)·ℓ(i, j) by
            their number K(K−1), as this project's own reference numbers have it [ours];
            ``labelled_pairs`` by the labelled pairs K(K−1)/2, which makes it an expectation;
            ``official``, as the code of EXPO (arXiv 2506.07492), takes that expectation too, and
            the KL as a mean over the K responses. Of the losses only TYPO's KL feels the
            difference: beside a mean over rows it counts twice, once, and 1/K times.

    Raises:
        InputError: π* whose pairs have no small common denominator.
    """
    K = len(prompt.true)
    true = [Fraction(p).limit_denominator(1000) for p in prompt.true.tolist()]
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    preferred = {(i, j): true[i] / (true[i] + true[j]) for i, j in pairs}
    each = math.lcm(*(p.denominator for p in preferred.values()))
    if each * len(pairs) > _MOST_ROWS or not torch.allclose(
        torch.tensor([float(p) for p in true], dtype=torch.float64), prompt.true, rtol=0, atol=1e-12
    ):
        raise InputError(
            f"true is {prompt.true.tolist()}: in exact proportion its pairs would need more than "
            f"{_MOST_ROWS} rows: give rounder numbers, such as tenths."
        )
    chosen, rejected = [], []
    for (i, j), p in preferred.items():
        wins = int(p * each)
        chosen += [i] * wins + [j] * (each - wins)
        rejected += [j] * wins + [i] * (each - wins)
    return Rows(
        prompt,
        torch.tensor(chosen),
        torch.tensor(rejected),
        prompt.reference,
        prompt.true,
        convention,
    )


def sampled(prompt: Prompt, n: int, seed: int, convention: Convention = "ordered_pairs") -> Rows:
    """N labelled pairs, N reference samples and N gold responses, drawn at random.

    TYPO's KL becomes the mean of log π_ref(y) − log π_θ(y) over the samples.

    Args:
        prompt: where they come from.
        n: N.
        seed: of the draw.
        convention: as in :func:`population`.
    """
    generator = torch.Generator().manual_seed(seed)
    K = len(prompt.true)
    pairs = torch.combinations(torch.arange(K))
    pairs = pairs[torch.randint(len(pairs), (n,), generator=generator)]
    first, second = prompt.true[pairs[:, 0]], prompt.true[pairs[:, 1]]
    wins = torch.rand(n, generator=generator, dtype=torch.float64) < first / (first + second)

    def shares(distribution: Tensor) -> Tensor:
        drawn = torch.multinomial(distribution, n, replacement=True, generator=generator)
        return torch.bincount(drawn, minlength=K) / drawn.new_tensor(n, dtype=torch.float64)

    return Rows(
        prompt,
        torch.where(wins, pairs[:, 0], pairs[:, 1]),
        torch.where(wins, pairs[:, 1], pairs[:, 0]),
        shares(prompt.reference),
        shares(prompt.true),
        convention,
    )


def arms(prompt: Prompt, convention: Convention) -> int:
    """What every KL is divided by: in EXPO's official code the number of responses, else 1."""
    return len(prompt.true) if convention == "official" else 1


def at_strength(objective: PreferenceModule, value: float) -> PreferenceModule:
    """A copy of the objective with λ in the setting that its class names as ``strength``.

    An objective without that setting (SFT) is returned as it is. A mixture passes λ on to all of
    its parts.

    Raises:
        InputError: λ is not above zero.
    """
    objective = copy.deepcopy(objective).eval()
    parts = objective.parts if isinstance(objective, Mixture) else [objective]
    for part in parts:
        if has_strength(part):
            setattr(part, part.strength, positive(part.strength, value))
    return objective


def has_strength(objective: PreferenceModule) -> bool:
    """Whether some setting of the objective holds the policy to the reference."""
    if isinstance(objective, Mixture):
        return any(has_strength(part) for part in objective.parts)
    return hasattr(objective, objective.strength)


@dataclass(frozen=True)
class Solution:
    """A minimiser, and what there is to say against it.

    Attributes:
        log_policies: log π_θ of all minimisers that were found, whose losses are the same up to
            rounding, the lowest first [M, K].
        loss: its value there.
        gradient: the gradient's norm there, with respect to the logits.
        remark: empty if the lowest is a stationary point and the only one of that loss.
    """

    log_policies: Tensor
    loss: float
    gradient: float
    remark: str

    @property
    def log_policy(self) -> Tensor:
        """log π_θ of the lowest [K]."""
        return self.log_policies[0]

    @property
    def policy(self) -> Tensor:
        """π_θ of the lowest [K]."""
        return self.log_policy.exp()

    def distance(self, target: Tensor) -> float:
        """Total variation to a distribution [K], of the minimiser that is farthest from it."""
        return max(distance(policy, target) for policy in self.log_policies.exp())

    def kl(self, target: Tensor) -> float:
        """KL(target ‖ π_θ) in nats, of the minimiser where it is largest."""
        return max(kl(target, log_policy) for log_policy in self.log_policies)


def solve(objective: PreferenceModule, rows: Rows, penalty: float = 0.0) -> Solution:
    """The policy softmax(θ) that minimises an objective's mean loss over the rows.

    Descends from several starts and keeps the lowest end. What training takes as constant (KTO's
    baseline, BCO's shift, WPO's weights) is held while descending and computed anew at the end,
    until the policy repeats itself: the point where training comes to rest, which is not the
    minimum of the loss as a function of them too.

    Args:
        objective: without a policy of its own.
        rows: the data.
        penalty: α of an added α‖θ‖². Under the convention ``ordered_pairs`` it stands beside half
            of the mean, as the convention says [ours; in EXPO's code beside the mean].
    """
    every = starts = starting_points(rows.prompt)
    held = rows.prompt.reference.log()
    for _ in range(_ROUNDS):
        fixed = copy.deepcopy(objective)
        fixed.observe(rows.log_probs(held, held, objective.needs), step_ended=True)

        def loss(theta: Tensor, fixed=fixed, held=held) -> Tensor:
            value = _losses(fixed, rows, theta.log_softmax(0), held).mean()
            return rows.share * value + penalty * theta.square().sum() if penalty else value

        solution = lowest([minimise(loss, start) for start in starts])
        moved = distance(solution.policy, held.exp())
        settled = moved <= _SETTLED or not _holds_anything(objective)
        if settled and starts is every:
            return solution
        # Between two looks at the whole landscape it is enough to follow one valley.
        starts, held = every if settled else [solution.log_policy], solution.log_policy
    return replace(solution, remark=f"no fixed point: it still moves by {moved:.2g}")


def starting_points(prompt: Prompt) -> list[Tensor]:
    """The truth, the uniform policy and the reference, also tilted to the truth, as logits [K].

    The tilts reach from slight to extreme, since λ sets the scale on which a loss bends: where it
    has several valleys, or flat land, another start finds the lowest.
    """
    truth, reference = prompt.true.log(), prompt.reference.log()
    tilts = (0.0, 0.003, 0.03, 0.3, 3.0, 30.0, 300.0)
    return [truth, torch.zeros_like(truth), *(reference + tilt * truth for tilt in tilts)]


def lowest(ends: list[Minimum]) -> Solution:
    """The lowest of several ends of the same loss, and those that equal it."""
    best = min(ends, key=lambda end: end.value)
    tied = [end for end in ends if end.value <= best.value + _TIE * max(1.0, abs(best.value))]
    policies = torch.stack([end.point.log_softmax(0) for end in (best, *tied)])
    apart = max(distance(policy, policies[0].exp()) for policy in policies.exp())
    remarks: list[str] = [] if best.status == "stationary" else [best.status]
    if apart > 1e-3:
        remarks.append(f"minimisers up to {apart:.2g} apart")
    return Solution(policies, best.value, best.gradient, "; ".join(remarks))


def _losses(objective: PreferenceModule, rows: Rows, policy: Tensor, held: Tensor) -> Tensor:
    """Loss of each row [B]; a mixture's parts see the rows each by its own needs."""
    if isinstance(objective, Mixture):
        parts = [_losses(part, rows, policy, held) for part in objective.parts]
        return policy.new_tensor(objective.weights) @ torch.stack(parts)
    log_probs = objective.complete(rows.log_probs(policy, held, objective.needs))
    return objective.losses(log_probs)


def _holds_anything(objective: PreferenceModule) -> bool:
    runs = type(objective).observe is not PreferenceModule.observe
    return runs or objective.needs.moments or Role.MISMATCHED in objective.needs.roles


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation between two distributions [K], from 0 to 1."""
    return 0.5 * (p - q).abs().sum().item()


def kl(p: Tensor, log_q: Tensor) -> float:
    """KL(p ‖ q) in nats, of a distribution [K] and another's logarithm [K]."""
    return (torch.special.xlogy(p, p) - torch.where(p > 0, p * log_q, 0)).sum().item()
