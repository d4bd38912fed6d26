"""PreferenceModule: pairs through the policy, an objective on their log-probs."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rotopo.callbacks import (
    CacheReference,
    CompileLayers,
    Displacement,
    ImplicitRewards,
    Orthogonality,
    PairScores,
    PredictionWriter,
    Speed,
    Yardstick,
)
from rotopo.data.asked import Draw
from rotopo.data.batch import PairBatch, PromptBatch
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.models.outcome import PairOutcome, StepOutput
from rotopo.models.settings import PolicyConfig, Sampling
from rotopo.run.as_adapter import from_runs
from rotopo.run.lightning import data_of, trainer_of
from rotopo.run.steps import ends_step, works_in_steps_only
from rotopo.training import PairwiseModule

if TYPE_CHECKING:  # else rotopo --help would wait for PEFT and transformers
    from rotopo.models.policy import Policy


class PreferenceModule(PairwiseModule):
    """A preference objective on a policy.

    A new objective is a subclass with the methods ``losses`` and ``rewards``: pure functions of
    the log-probs, one value per pair, which also work without a policy. ``needs`` says what they
    are computed from; what else they depend on, such as running values, ``complete`` hands them.

    Args:
        policy: the model, its adapter, and how both are loaded.
        optimizer: any optimiser by class path, with its settings.
        scheduler: any learning-rate scheduler by class path, stepped once per optimiser step.
        sampling: how ``predict`` generates.
        parameter_groups: settings of the optimiser for some parameters, by regular expressions in
            their names, see :class:`~rotopo.training.PairwiseModule`.
    """

    # The setting that holds the policy to its reference: what studies sweep.
    strength: ClassVar[str] = "beta"
    # Whether a response's reward depends on the other response of its pair.
    paired_rewards: bool = False
    # β, λ and their like have no unit.
    reward_unit = "nats"
    # Tokens at most of a response drawn from the reference, for objectives that need one.
    sample_tokens: int = 0

    def __init__(
        self,
        policy: PolicyConfig = PolicyConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        parameter_groups: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, parameter_groups)
        self.policy_config = policy
        self.sampling = sampling
        self.policy: Policy | None = None

    @abstractmethod
    def losses(self, log_probs: PairLogProbs) -> Tensor:
        """Loss of each row [B]; its mean is minimised."""
        raise NotImplementedError(f"{type(self).__name__} has no losses().")

    @abstractmethod
    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """The objective's own implicit rewards of chosen and rejected responses, each [B]."""
        raise NotImplementedError(f"{type(self).__name__} has no rewards().")

    def complete(self, log_probs: PairLogProbs) -> PairLogProbs:
        """Log-probs with what the losses and rewards depend on beside them, in ``handed``: sums
        over ranks, running values, draws. Called once for every batch that a step computes, before
        these; not for responses that ``predict`` scores one by one.

        Args:
            log_probs: of the batch.
        """
        return log_probs

    def observe(self, log_probs: PairLogProbs, step_ended: bool) -> None:
        """See a micro-batch whose loss has been computed; for objectives with running values.

        Args:
            log_probs: of the micro-batch, cut from the graph.
            step_ended: whether it is the last of an optimiser step.
        """

    @property
    def model_config(self) -> PolicyConfig:
        return self.policy_config

    @property
    def backbone(self) -> "Policy":
        assert self.policy is not None
        return self.policy

    def configure_model(self) -> None:
        from rotopo.models.policy import Policy

        if self.policy is None:
            config = from_runs(self.policy_config)
            trainer = trainer_of(self)
            tested = trainer is not None and trainer.state.fn == TrainerFn.TESTING
            self.policy = Policy.load(config, self.needs.reference or tested, self.sharding)

    @property
    def compared(self) -> bool:  # type: ignore[override]
        """Whether there is a reference, which may be there for objectives without one too."""
        return self.backbone.has_reference

    def always_on(self) -> list[Callback]:
        return [
            ImplicitRewards(),
            Displacement(),
            Orthogonality(),
            Speed(),
            Yardstick(),
            PairScores(),
            PredictionWriter(),
            CacheReference(),
            CompileLayers(),
        ]

    def training_step(self, batch: PairBatch, batch_idx: int) -> StepOutput:
        if self.backbone.starts_at_reference and trainer_of(self) is not None:
            self.backbone.check_start(batch, self.needs)
        output = super().training_step(batch, batch_idx)
        # Here rather than in a later hook: a checkpoint may be written before that.
        trainer, log_probs = trainer_of(self), output["pairs"].log_probs
        assert log_probs is not None
        self.observe(log_probs, trainer is None or ends_step(trainer, batch_idx))
        return output

    def test_step(self, batch: PairBatch, batch_idx: int) -> StepOutput:
        return self._step(batch, self.compared)

    def draw(self, data: PairwiseDataModule) -> Draw:
        return partial(self.sample_reference, data=data)

    def predict(self, batch: PromptBatch | PairBatch) -> list[dict[str, Any]]:
        """A response to each prompt; or of given responses the implicit reward."""
        assert self.policy is not None
        data = data_of(self.trainer)
        if isinstance(batch, PairBatch):
            if self.paired_rewards:
                raise InputError(
                    f"data.score: {type(self).__name__}'s reward of a response depends on the one "
                    "that it is compared with, so that a single one has none: score with DPO."
                )
            # Responses of other kinds, which some objectives train on, have no say in a reward.
            log_probs = self.policy(batch, replace(self.needs, roles=()))
            return [{"score": reward} for reward in self.rewards(log_probs)[0].tolist()]
        generate = partial(self.policy.generate, sampling=self.sampling, stop_ids=data.stop_ids)
        return data.predicted.respond(batch, generate)

    def sample_reference(
        self, prompts: Sequence[list[int]], data: PairwiseDataModule
    ) -> list[list[int]]:
        """A response drawn from the reference for each prompt, the end of turn included.

        Args:
            prompts: token ids.
            data: the datamodule that they come from.

        Raises:
            InputError: the strategy is FSDP1.
        """
        from rotopo.models.samples import sample_reference

        assert self.policy is not None
        if works_in_steps_only(self.trainer):
            raise InputError(
                f"{type(self).__name__} draws responses from the reference, which FSDPStrategy "
                "does not support: take configs/strategies/fsdp2.yaml, or name a column of them in "
                "data.extra_responses, {reference_sample: COLUMN}."
            )
        return sample_reference(
            self.policy,
            prompts,
            self.sample_tokens,
            data.encoder,
            data.pairs.cache_dir / "reference_samples",
            data.batching.seed,
        )

    def _step(self, batch: PairBatch, compared: bool = False) -> StepOutput:
        assert self.policy is not None
        log_probs = self.complete(self.policy(batch, self.needs, compared))
        losses = self.losses(log_probs)
        detached = log_probs.detach()
        chosen, rejected = self.rewards(detached)
        pairs = PairOutcome(
            losses.detach(),
            chosen,
            rejected,
            detached.has_chosen,
            detached.has_rejected,
            detached,
        )
        return self._output(batch, losses, pairs)


class ReferenceObjective(PreferenceModule):
    """Parent of objectives whose implicit reward is β·Δ, β times the log-ratio to the reference.

    A subclass declares its own ``beta``, so that each has its own default.
    """

    beta: float

    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        return self.beta * log_probs.chosen_log_ratio, self.beta * log_probs.rejected_log_ratio

    def margin(self, log_probs: PairLogProbs) -> Tensor:
        """The chosen's reward less the rejected's [B]."""
        chosen, rejected = self.rewards(log_probs)
        return chosen - rejected


def positive(name: str, value: float) -> float:
    """The value of a setting that has to be above zero."""
    if not value > 0:
        raise InputError(f"{name} is {value}: it has to be above zero.")
    return value


def in_range(name: str, value: float, low: float, high: float) -> float:
    """The value of a setting that has to lie in [low, high)."""
    if not low <= value < high:
        raise InputError(f"{name} is {value}: it has to be at least {low} and below {high}.")
    return value


def either(name: str, value: str, one: str, other: str) -> str:
    """The value of a setting that has to be one of two."""
    if value not in (one, other):
        raise InputError(f"{name} is {value!r}: it has to be {one!r} or {other!r}.")
    return value
