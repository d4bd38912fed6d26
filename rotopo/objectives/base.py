"""PreferenceModule: pairs through the policy, an objective on their log-probs."""

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rotopo.callbacks import (
    Displacement,
    ImplicitRewards,
    Orthogonality,
    ResponseWriter,
    Speed,
)
from rotopo.data.batch import PairBatch, PromptBatch
from rotopo.errors import InputError
from rotopo.models.log_probs import PairLogProbs
from rotopo.models.policy import Policy, PolicyConfig, Sampling
from rotopo.training import PairwiseModule


class PreferenceModule(PairwiseModule):
    """A preference objective on a policy.

    A new objective is a subclass with the methods ``losses`` and ``rewards``: pure functions of
    the log-probs, one value per pair. All steps return ``loss`` with the detached ``losses`` [B]
    and ``log_probs``, from which the callbacks log.

    Args:
        policy: the model, its adapter, and how both are loaded.
        optimizer: any optimiser by class path, with its settings.
        scheduler: any learning-rate scheduler by class path, stepped once per optimiser step.
        sampling: how ``predict`` generates.
    """

    needs_reference: ClassVar[bool] = True

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.policy_config = policy
        self.sampling = sampling
        self.policy: Policy | None = None

    @abstractmethod
    def losses(self, log_probs: PairLogProbs) -> Tensor:
        """Loss of each pair [B], in nats where the objective is a log-likelihood."""
        raise NotImplementedError(f"{type(self).__name__} has no losses().")

    @abstractmethod
    def rewards(self, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and of the rejected responses, each [B]."""
        raise NotImplementedError(f"{type(self).__name__} has no rewards().")

    @property
    def base_fingerprint(self) -> str:
        assert self.policy is not None
        return self.policy.base_fingerprint

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = Policy.load(self.policy_config, self.needs_reference)

    def configure_callbacks(self) -> list[Callback]:
        """What every run logs; one of the same class in ``trainer.callbacks`` takes precedence."""
        given = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        always: list[Callback] = [
            ImplicitRewards(),
            Displacement(),
            Orthogonality(),
            Speed(),
            ResponseWriter(),
        ]
        return [callback for callback in always if type(callback) not in given]

    def training_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        return self._step(batch)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        return self._step(batch)

    def test_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        return self._step(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[list[int]]:
        """Response token ids for each prompt of the batch."""
        assert self.policy is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return self.policy.generate(batch, self.sampling, data.stop_ids, data.pad_id)

    def _step(self, batch: PairBatch) -> dict[str, Any]:
        assert self.policy is not None
        log_probs = self.policy(batch, with_reference=self.needs_reference)
        losses = self.losses(log_probs)
        return {
            "loss": losses.sum() * batch.loss_scale,
            "losses": losses.detach(),
            "log_probs": log_probs.detach(),
        }


def positive(name: str, value: float) -> float:
    """The value of a setting that has to be above zero."""
    if not value > 0:
        raise InputError(f"{name} is {value}: it has to be above zero.")
    return value
