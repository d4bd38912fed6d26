"""The noise study's tabular task: small enough for many seeds, with the truth known.

A prompt x has 8 candidate responses y, both in R⁸, and a true reward r*(x, y) = xᵀAy + bᵀy. The
policy is a softmax over a prompt's candidates of an MLP on (x, y), the reference is uniform, which
is where the policy starts. One pair of candidates per prompt is labelled by r*, and some labels are
flipped. The losses and rewards are those that training uses: a module's own on
:class:`~rotopo.models.log_probs.PairLogProbs`, with candidates as responses of one token.

The task is ours, as are its sizes. The losses are the papers', and of the alternation the outline,
see :mod:`rotopo.robust.alternation`.
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rotopo.data.batch import Role
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.objectives import ROPO
from rotopo.objectives.base import PreferenceModule, ReferenceObjective
from rotopo.robust.flips import flip_detection
from rotopo.robust.selection import best_and_worst, keep, n_kept, threshold
from rotopo.studies.noise_methods import Method, Outcome, Round, TaskSettings

TRAINING, HELD_OUT = 1000, 1500  # prompts
CANDIDATES, SIZE, HIDDEN = 8, 8, 96
LEARNING_RATE, BATCH = 2e-3, 100

# What is drawn from a seed, each from a stream of its own: two methods, or two flip rates, differ
# in nothing that they need not differ in.
_DATA, _WEIGHTS, _ORDER, _SAMPLES = range(1, 5)


@dataclass(frozen=True)
class Prompts:
    """P prompts and their candidates.

    Attributes:
        features: x and y of each candidate, side by side [P, 8, 16].
        reward: r* [P, 8].
        better, worse: the pair, candidates of the larger and the smaller r* [P].
    """

    features: Tensor
    reward: Tensor
    better: Tensor
    worse: Tensor

    def __getitem__(self, part: slice) -> "Prompts":
        return Prompts(self.features[part], self.reward[part], self.better[part], self.worse[part])


@dataclass(frozen=True)
class Pairs:
    """M labelled pairs: each one's prompt, and which of its candidates is preferred, all [M]."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    def __getitem__(self, places: Tensor) -> "Pairs":
        return Pairs(self.prompt[places], self.chosen[places], self.rejected[places])

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(
            torch.cat([self.prompt, other.prompt]),
            torch.cat([self.chosen, other.chosen]),
            torch.cat([self.rejected, other.rejected]),
        )

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Tabular(TaskSettings):
    """The tabular task, with its settings.

    Args:
        alpha: α of ROPO.
        **kwargs: of :class:`~rotopo.studies.noise_methods.TaskSettings`.

    Raises:
        InputError: a setting out of its range.
    """

    # What is compared, and from which seeds, where nothing else is asked for.
    methods: ClassVar[tuple[str, ...]] = (
        "DPO",
        "cDPO",
        "RobustDPO",
        "IPO",
        "DrDPO",
        "HolderDPO",
        "ROPO",
        "DPO+filter",
        "ROPO+filter",
        "ROPO+filter+sampling",
        "SLiC",
        "SimPO",
        "TYPO",
    )
    seeds: ClassVar[tuple[int, ...]] = tuple(range(1000, 1020))

    alpha: float = 14.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not n_kept(TRAINING, self.rho):
            raise InputError(f"rho is {self.rho}: of {TRAINING} pairs none would be left.")

    def check(self, method: Method, flip_rate: float) -> None:
        """See that a method can be run at all.

        Raises:
            InputError: its objective needs what there is not here.
        """
        module = self._module(method, flip_rate)
        missing = {
            "responses to other prompts": Role.MISMATCHED in module.needs.roles,
            "gold responses": Role.GOLD in module.needs.roles,
            "single tokens' weights": module.paired_rewards or module.needs.moments,
        }
        for what, needed in missing.items():
            if needed:
                raise InputError(
                    f"objective: {method.name} works on {what}, of which the tabular task has "
                    "none: leave it out."
                )

    def run(self, method: Method, flip_rate: float, seed: int) -> Outcome:
        """Train a policy from a seed, and see what it has learnt.

        The same seed has the same prompts, first weights and order of batches for all methods, and
        what is flipped at one rate is flipped at every higher one.

        Raises:
            InputError: training diverged.
        """
        module = self._module(method, flip_rate)
        prompts, draws = drawn(seed)
        train, held_out = prompts[:TRAINING], prompts[TRAINING:]
        flipped = draws < flip_rate
        original = labelled(train, flipped)
        policy = Policy(module, train, seed)
        rounds: list[Round] = []
        pairs, n_rounds = original, self.rounds if method.filtered else 1
        rng = np.random.default_rng([seed, _SAMPLES])
        for number in range(1, n_rounds + 1):
            policy.fit(pairs, self.epochs // n_rounds)
            if number == n_rounds:
                break
            losses = policy.losses(original)
            kept = keep(losses, n_kept(TRAINING, self.rho))
            dropped = np.flatnonzero(~kept)
            pairs = original[torch.from_numpy(np.flatnonzero(kept))]
            accepted = original[torch.empty(0, dtype=torch.long)]
            if method.sampled and len(dropped):
                at_most = threshold(losses[kept], self.quantile)
                accepted = self._new_pairs(
                    policy, original[torch.from_numpy(dropped)], at_most, rng
                )
                pairs = pairs + accepted
            better, worse = (
                train.reward[accepted.prompt, which]
                for which in (accepted.chosen, accepted.rejected)
            )
            rounds.append(
                Round(
                    number,
                    len(dropped),
                    int(flipped[dropped].sum()),
                    len(accepted),
                    int((better > worse).sum()),
                )
            )
        clean = labelled(held_out, np.zeros(HELD_OUT, dtype=bool))
        margins = policy.margins(held_out, clean)
        found = flip_detection(policy.margins(train, original), flipped, self.rho)
        return Outcome(float((margins > 0).mean()), found.get("auroc"), found.get("recall"), rounds)

    def _module(self, method: Method, flip_rate: float) -> PreferenceModule:
        settings = {}
        if issubclass(method.objective, ReferenceObjective):
            settings["beta"] = self.beta
        if issubclass(method.objective, ROPO):
            settings["alpha"] = self.alpha
        return method.build(flip_rate, **settings).eval()

    def _new_pairs(
        self, policy: "Policy", dropped: Pairs, at_most: float, rng: np.random.Generator
    ) -> Pairs:
        """ROPO's rejection sampling: of the originals and K samples the best and the worst.

        [ours: the paper states its purpose only]

        Args:
            policy: which draws, and by whose implicit rewards the two are chosen.
            dropped: the pairs to be replaced [D].
            at_most: the loss up to which a new pair is accepted.
            rng: of the draws.
        """
        D = len(dropped)
        log_policy = policy.log_policy(policy.train)[dropped.prompt]
        # The largest of log p + Gumbel noise is a draw from p.
        noise = rng.gumbel(size=(D, self.samples, CANDIDATES))
        samples = (log_policy.numpy()[:, None] / self.temperature + noise).argmax(-1)
        pool = np.zeros((D, CANDIDATES), dtype=bool)
        pool[np.arange(D)[:, None], samples] = True
        pool[np.arange(D), dropped.chosen] = pool[np.arange(D), dropped.rejected] = True
        rewards = policy.rewards(log_policy)
        best, worst, differ = best_and_worst(np.where(pool, rewards, np.nan))
        new = Pairs(dropped.prompt, torch.from_numpy(best), torch.from_numpy(worst))
        accepted = differ & (policy.losses(new) <= at_most)
        return new[torch.from_numpy(np.flatnonzero(accepted))]


class Policy:
    """softmax over a prompt's candidates of an MLP, and the training of it.

    Args:
        module: the objective, whose running values are kept here.
        train: training prompts.
        seed: of the first weights, and of the order of the pairs.
    """

    def __init__(self, module: PreferenceModule, train: Prompts, seed: int) -> None:
        self.module = copy.deepcopy(module)
        self.train = train
        self.network = network(seed)
        self.optimizer = torch.optim.Adam(self.network.parameters(), LEARNING_RATE, fused=True)
        self.margin_only = sees_margins_only(module)
        self._order = np.random.default_rng([seed, _ORDER])

    def fit(self, pairs: Pairs, epochs: int) -> None:
        """Go through the pairs so many times, each time in another order."""
        for _ in range(epochs):
            order = torch.from_numpy(self._order.permutation(len(pairs)))
            for places in order.split(BATCH):
                log_probs = self.log_probs(pairs[places])
                self.optimizer.zero_grad()
                self.module.losses(self.module.complete(log_probs)).mean().backward()
                self.optimizer.step()
                self.module.observe(log_probs.detach(), step_ended=True)

    def log_probs(self, pairs: Pairs) -> PairLogProbs:
        """A batch of training pairs, for the loss.

        If the loss does not change when both log-probs of a pair move by the same amount, the
        softmax's sum has no gradient, and the other candidates need not pass the network.
        """
        if self.margin_only:
            both = torch.stack([pairs.chosen, pairs.rejected], 1)
            scores = self.network(self.train.features[pairs.prompt[:, None], both]).squeeze(-1)
            return one_token(scores[:, 0], scores[:, 1])
        scores = self.network(self.train.features[pairs.prompt]).squeeze(-1)
        return of_pairs(scores.log_softmax(-1), pairs.chosen, pairs.rejected)

    @torch.no_grad()
    def log_policy(self, prompts: Prompts) -> Tensor:
        """log π_θ of all candidates [P, 8]."""
        log_policy = self.network(prompts.features).squeeze(-1).log_softmax(-1)
        if not log_policy.isfinite().all():
            raise InputError(
                f"{type(self.module).__name__}: training diverged: raise beta or leave it out."
            )
        return log_policy

    def losses(self, pairs: Pairs) -> np.ndarray:
        """Loss of each training pair [M]."""
        log_policy = self.log_policy(self.train)[pairs.prompt]
        log_probs = of_pairs(log_policy, pairs.chosen, pairs.rejected)
        return self.module.losses(self.module.complete(log_probs)).numpy()

    def margins(self, prompts: Prompts, pairs: Pairs) -> np.ndarray:
        """Reward of the chosen less that of the rejected, by the objective's own rewards [M]."""
        log_policy = self.log_policy(prompts)[pairs.prompt]
        log_probs = of_pairs(log_policy, pairs.chosen, pairs.rejected)
        chosen, rejected = self.module.rewards(log_probs)
        return (chosen - rejected).numpy()

    def rewards(self, log_policy: Tensor) -> np.ndarray:
        """Implicit rewards of the candidates whose log π_θ are given [P, 8]."""
        flat = log_policy.flatten()
        return self.module.rewards(one_token(flat, flat))[0].view_as(log_policy).numpy()


def truth() -> tuple[np.ndarray, np.ndarray]:
    """A [8, 8] and b [8] of r*(x, y) = xᵀAy + bᵀy, the same for all seeds."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((SIZE, SIZE)) / math.sqrt(SIZE), rng.standard_normal(SIZE)


def drawn(seed: int) -> tuple[Prompts, np.ndarray]:
    """A seed's prompts, those for training first, and of each of these a number from [0, 1) [P]:
    its label is flipped where that is below the flip rate."""
    rng = np.random.default_rng([seed, _DATA])
    P = TRAINING + HELD_OUT
    x, y = rng.standard_normal((P, SIZE)), rng.standard_normal((P, CANDIDATES, SIZE))
    A, b = truth()
    reward = np.einsum("pi,ij,pcj->pc", x, A, y) + y @ b
    pair = rng.permuted(np.tile(np.arange(CANDIDATES), (P, 1)), axis=1)[:, :2]
    order = np.argsort(-np.take_along_axis(reward, pair, 1), axis=1)
    better, worse = torch.from_numpy(np.take_along_axis(pair, order, 1)).unbind(1)
    features = np.concatenate([np.broadcast_to(x[:, None], y.shape), y], axis=2)
    prompts = Prompts(torch.from_numpy(features).float(), torch.from_numpy(reward), better, worse)
    return prompts, rng.random(TRAINING)


def labelled(prompts: Prompts, flipped: np.ndarray) -> Pairs:
    """Each prompt's pair, in the wrong order where it is flipped [P]."""
    swap = torch.from_numpy(flipped)
    return Pairs(
        torch.arange(len(swap)),
        torch.where(swap, prompts.worse, prompts.better),
        torch.where(swap, prompts.better, prompts.worse),
    )


def network(seed: int) -> torch.nn.Sequential:
    """The MLP, 16-96-96-1, its last layer zero, the others as torch initialises them [ours]."""
    sizes = (2 * SIZE, HIDDEN, HIDDEN, 1)
    first, second, last = (torch.nn.Linear(*ends) for ends in pairwise(sizes))
    rng = np.random.default_rng([seed, _WEIGHTS])
    with torch.no_grad():
        for layer, parameter in product((first, second), ("weight", "bias")):
            values = getattr(layer, parameter)
            bound = 1 / math.sqrt(layer.in_features)
            values.copy_(torch.from_numpy(rng.uniform(-bound, bound, values.shape)))
        last.weight.zero_()
        last.bias.zero_()
    return torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)


def of_pairs(log_policy: Tensor, chosen: Tensor, rejected: Tensor) -> PairLogProbs:
    """Pairs by their prompts' log π_θ [B, 8]; the KL to the reference, for TYPO, is exact."""
    both = log_policy.gather(1, torch.stack([chosen, rejected], 1))
    kl = -math.log(CANDIDATES) - log_policy.mean(1)
    return one_token(both[:, 0], both[:, 1], kl)


def one_token(chosen: Tensor, rejected: Tensor, kl: Tensor | None = None) -> PairLogProbs:
    """Responses of one token under log π_θ [B], against the uniform reference."""
    one = torch.ones(len(chosen), dtype=torch.long)
    reference = torch.full_like(chosen, -math.log(CANDIDATES), requires_grad=False)
    return PairLogProbs(chosen, rejected, one, one, reference, reference, reference_kl=kl)


def sees_margins_only(module: PreferenceModule) -> bool:
    """Whether the losses stay when both log-probs of a pair move by the same amount, tried out."""
    rng = np.random.default_rng(0)
    log_policy = torch.from_numpy(rng.standard_normal((64, CANDIDATES))).log_softmax(-1)
    chosen, rejected = torch.zeros(64, dtype=torch.long), torch.ones(64, dtype=torch.long)
    log_probs = of_pairs(log_policy, chosen, rejected)
    moved = of_pairs(log_policy + torch.linspace(-2, 2, len(log_policy))[:, None], chosen, rejected)
    losses, after = (module.losses(module.complete(of)) for of in (log_probs, moved))
    return torch.allclose(losses, after, rtol=1e-9, atol=1e-9)
