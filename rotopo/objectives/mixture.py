"""Mixture: a weighted sum of objectives."""

from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor

from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.models.settings import PolicyConfig, Sampling
from rotopo.objectives.base import PreferenceModule


class Mixture(PreferenceModule):
    """A weighted sum of objectives on one policy, DPO and SFT on the chosen for example.

    Rewards are those of the first objective.

    Args:
        objectives: the parts, by class path, without ``policy``, ``optimizer`` and ``scheduler``,
            which are the mixture's own.
        weights: one weight each; None for 1.
        **kwargs: of :class:`~rotopo.objectives.base.PreferenceModule`.

    Raises:
        InputError: no objective, another number of weights, or a part with its own policy.
    """

    def __init__(
        self,
        objectives: list[PreferenceModule],
        weights: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weights = [1.0] * len(objectives) if weights is None else weights
        if not objectives or len(self.weights) != len(objectives):
            raise InputError(
                f"objectives: {len(objectives)} of them and {len(self.weights)} weights: give at "
                "least one objective, and a weight for each."
            )
        for part in objectives:
            own = (part.policy_config, part.optimizer, part.scheduler, part.sampling)
            if own != (PolicyConfig(), None, None, Sampling()) or part.parameter_groups:
                raise InputError(
                    f"objectives: {type(part).__name__} has a policy, optimizer, scheduler, "
                    "parameter_groups or sampling of its own; they belong to the mixture: delete "
                    "them from the part, also where an older release has saved them in a "
                    "config.yaml."
                )
        self.parts = list(objectives)
        self.paired_rewards = objectives[0].paired_rewards
        self.couples_pairs = any(part.couples_pairs for part in objectives)
        # Each a child of the mixture: Lightning hands its trainer on to children only, and not to
        # the members of a list.
        for i, part in enumerate(objectives):
            self.add_module(f"objective_{i}", part)
        self.needs = reduce(or_, (part.needs for part in objectives))
        self.sample_tokens = max(part.sample_tokens for part in objectives)

    @property
    def reward_unit(self) -> str:  # type: ignore[override]
        return self.parts[0].reward_unit

    def losses(self, log_probs: PairLogProbs) -> Tensor:
        terms = [part.losses(_of_part(i, log_probs)) for i, part in enumerate(self.parts)]
        return sum(w * term for w, term in zip(self.weights, terms, strict=True))  # type: ignore[return-value]

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return self.parts[0].rewards(_of_part(0, log_probs))

    def complete(self, log_probs: PairLogProbs) -> PairLogProbs:
        """With what each part is handed, under the part's number."""
        return replace(
            log_probs,
            handed={
                f"{i}.{name}": value
                for i, part in enumerate(self.parts)
                for name, value in part.complete(log_probs).handed.items()
            },
        )

    def on_train_start(self) -> None:
        super().on_train_start()
        for part in self.parts:
            part.on_train_start()

    def observe(self, log_probs: PairLogProbs, step_ended: bool) -> None:
        for i, part in enumerate(self.parts):
            part.observe(_of_part(i, log_probs), step_ended)


def _of_part(number: int, log_probs: PairLogProbs) -> PairLogProbs:
    """Log-probs with what one part is handed."""
    prefix = f"{number}."
    own = {k.removeprefix(prefix): v for k, v in log_probs.handed.items() if k.startswith(prefix)}
    return replace(log_probs, handed=own)
