"""What every module of the package shares: optimiser, schedule, clipping, small checkpoints."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Container, Mapping
from dataclasses import is_dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

import rotopo
from rotopo.callbacks.doctor import DataDoctor
from rotopo.callbacks.finite import Finite
from rotopo.callbacks.learning_rate import LearningRate
from rotopo.callbacks.monitors import MetricSchedules
from rotopo.data.asked import Draw
from rotopo.data.module import PairwiseDataModule
from rotopo.data.needs import Needs
from rotopo.devices import refuse_on_mps
from rotopo.errors import InputError
from rotopo.models.outcome import PairOutcome, StepOutput
from rotopo.optimisers import Warmup as Warmup  # known by this path
from rotopo.optimisers import configured
from rotopo.refusals import naming
from rotopo.run.accumulation import Accumulation
from rotopo.run.adapters import configuration
from rotopo.run.changed import Known, say
from rotopo.run.fits import refuse_another_model
from rotopo.run.interruption import Interruption
from rotopo.run.lightning import (
    callbacks_of,
    data_if_any,
    trainer_of,
    without_wrappers,
)
from rotopo.run.rates import Rates
from rotopo.run.resume import Resumption, keep_given
from rotopo.run.steps import check_steps_are_whole

if TYPE_CHECKING:  # else rotopo --help would wait for them
    from transformers import PreTrainedModel

    from rotopo.data.batch import PairBatch, PromptBatch
    from rotopo.models.backbone import Backbone
    from rotopo.models.settings import BackboneConfig
    from rotopo.models.sharding import Sharding


def _settings(value: Any) -> Any:
    """What of a setting can be written as JSON, the same in every process: None for the rest."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        items = {str(key): _settings(v) for key, v in value.items() if str(key)[:1] != "_"}
        return {key: items[key] for key in sorted(items) if key != "training"}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_settings(v) for v in value]
    return _settings(vars(value)) if is_dataclass(value) else None


class PairwiseModule(LightningModule):
    r"""Parent of preference objectives and reward models.

    Checkpoints hold what trains, with the optimiser, the loops, the data position and the random
    state, but not the frozen base model, which is named by its fingerprint.

    Args:
        optimizer: any optimiser by class path, with its settings.
        scheduler: any learning-rate scheduler by class path, stepped once per optimiser step;
            one that takes ``total_steps`` and has none set gets the Trainer's number. One that
            follows a metric, ``lightning.pytorch.cli.ReduceLROnPlateau`` with its ``monitor``, is
            stepped after each validation, or for a metric that is not under ``val/`` at the end
            of each epoch. None keeps the learning rate.
        parameter_groups: settings of the optimiser for some parameters, by a regular expression
            that is looked for in their names: ``{lora_B: {lr_ratio: 16}}`` is LoRA+. Any setting
            of the optimiser, or ``lr_ratio``, a multiple of its ``lr``. Where several expressions
            are found in a name, each setting is that of the first that has it; the last of all is
            ``\.rotation_: {weight_decay: 0}``.
    """

    # Whether a pair's loss depends on the other pairs of its micro-batch, as KTO's does.
    couples_pairs: bool = False
    # What the loss is computed from.
    needs: Needs = Needs()
    # Whether a test compares the module with a reference.
    compared: bool = False
    # Unit of the rewards, for whoever draws them; empty where they have none.
    reward_unit: str = ""

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        parameter_groups: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.parameter_groups = parameter_groups
        self.strict_loading = False  # on_load_checkpoint is stricter about what matters
        self._resumption = Resumption()
        self._accumulation = Accumulation(self._resumption)
        self._rates = Rates()
        self._known = Known()
        self.row_losses: Tensor | None = None  # of the micro-batch at hand [B]
        self._left_out: Container[int] = ()  # rows that need no prediction

    def setup(self, stage: str) -> None:
        """Ask the data for what the module needs, and refuse a Trainer that would cast everything,
        or cast twice.

        Raises:
            InputError: ``trainer.precision`` is a true half precision, or set beside
                ``compute_dtype``; Apple's mps lacks something.
        """
        config = self.model_config
        refuse_on_mps(self.trainer.strategy.root_device, self, config.dtype, config.attention)
        if config.compute_dtype is not None and self.trainer.precision != "32-true":
            raise InputError(
                f"trainer.precision {self.trainer.precision!r} and {config.setting}.compute_dtype "
                "would both cast: leave trainer.precision out."
            )
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise InputError(
                f"trainer.precision {self.trainer.precision!r} would cast the adapter too, whose "
                "small steps a half type loses: leave it out and set policy.dtype (of a reward "
                "model, backbone.dtype) instead, or for full fine-tuning policy.compute_dtype."
            )
        data = data_if_any(self.trainer)
        if isinstance(data, PairwiseDataModule):
            data.ask(self.needs, type(self).__name__, self.draw(data))
            if stage == "fit":
                self._accumulation.begin(
                    self.trainer, type(self).__name__ if self.couples_pairs else ""
                )
                data.accumulate = self._accumulation

    def draw(self, data: PairwiseDataModule) -> Draw | None:
        """What draws responses from the module's reference, once the data wants some; None where
        there is no reference.

        Args:
            data: whose prompts they respond to.
        """
        return None

    @property
    def sharding(self) -> "Sharding | None":
        """How the strategy wants the model divided; None where it does so itself, or not at all."""
        return getattr(self.trainer.strategy, "sharding", None) if trainer_of(self) else None

    @property
    @abstractmethod
    def model_config(self) -> "BackboneConfig":
        """The model's settings."""

    @property
    @abstractmethod
    def backbone(self) -> "Backbone":
        """The policy, or the reward model's scorer, once it is loaded."""

    @property
    def base_fingerprint(self) -> str:
        """Hash of the base model's weights as loaded, before training."""
        return self.backbone.base_fingerprint

    @property
    def language_model(self) -> "PreTrainedModel":
        """The Hugging Face model that batches go through; adapted layers sit inside it."""
        return self.backbone.language_model

    @abstractmethod
    def always_on(self) -> list[Callback]:
        """Callbacks of every run, unless ``trainer.callbacks`` has one of the same class."""

    def configure_callbacks(self) -> list[Callback]:
        given = {type(callback) for callback in callbacks_of(self.trainer)}
        rates = [LearningRate()] if LearningRateMonitor not in given else []
        # The last may end the run.
        always = [DataDoctor(), *self.always_on(), *rates, MetricSchedules(), Finite()]
        return [one for one in [*always, Interruption()] if type(one) not in given]

    def response_lengths(self, batch: "PairBatch") -> Tensor:
        """Tokens of each response of a batch, the end-of-turn token included [S]."""
        return batch.lengths

    def saved_names(self) -> set[str]:
        """What a checkpoint holds: parameters that train, and the module's own running values."""
        own = {name: p.requires_grad for name, p in self.named_parameters()}
        trained = {without_wrappers(name) for name in own if own[name]}
        # A module inside another, as in a mixture, has running values too; a model has its own.
        modules = {n: m for n, m in self.named_modules() if isinstance(m, PairwiseModule)}
        return trained | {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in modules.items()
            for name, _ in module.named_buffers(recurse=False)
        }

    def training_step(self, batch: "PairBatch", batch_idx: int) -> StepOutput:
        output = self._step(batch)
        self.row_losses = output["pairs"].losses
        return output

    def validation_step(self, batch: "PairBatch", batch_idx: int) -> StepOutput:
        return self._step(batch)

    def test_step(self, batch: "PairBatch", batch_idx: int) -> StepOutput:
        return self._step(batch)

    @abstractmethod
    def _step(self, batch: "PairBatch") -> StepOutput:
        """The loss of a batch, and what is to be known of its pairs."""

    def _output(self, batch: "PairBatch", losses: Tensor, pairs: PairOutcome) -> StepOutput:
        """What a step returns.

        Args:
            batch: that has just gone through the backbone.
            losses: of its rows, with their gradient [B].
            pairs: what is to be known of them.
        """
        output: StepOutput = {"loss": losses.sum() * batch.loss_scale, "pairs": pairs}
        router = self.backbone.router
        if router is not None:
            # Not scaled by pairs: over micro-batches and ranks it is a mean, which Lightning's
            # division by the accumulation and DDP's by the ranks make of it.
            loss = self.backbone.take_router_loss()
            output["loss"] = output["loss"] + router.coefficient * loss
            output["router_loss"] = loss.detach()
        return output

    def configure_optimizers(self) -> Any:
        made, given = configured(
            self.optimizer,
            self.scheduler,
            self.named_parameters(),
            trainer_of(self),
            self.parameter_groups,
        )
        self._rates.take(given)
        return made

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with naming("model.optimizer"):
            super().optimizer_step(*args, **kwargs)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        with naming("model.scheduler", on_purpose=False):
            super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # A shard knows only its part of the norm; FSDP1's root knows the whole.
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy) and gradient_clip_val:
            assert strategy.model is not None
            strategy.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[operator]
        else:
            with naming("trainer.gradient_clip_val"):
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = self.saved_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in saved}
        checkpoint["rotopo"] = {
            "version": rotopo.__version__,
            "base_fingerprint": self.base_fingerprint,
            "shapes": {k: list(v.shape) for k, v in checkpoint["state_dict"].items()},
            "settings": self._known.settings,
            "adapter": configuration(self.backbone.model),
            "base": vars(self.backbone.base) | {"moved": self.backbone.moved},
            "optimization": self._rates.save(self.trainer),
            "threads": torch.get_num_threads(),
            "accumulation": self._accumulation.save(),
        }
        checkpoint["start"] = self.backbone.starting_adapter()
        self._resumption.save(self.trainer, checkpoint)

    def know(self, settings: Mapping[str, Any], compared: bool) -> None:
        """Know the settings of the run, for checkpoints to hold.

        Args:
            settings: all of them, as config.yaml has them.
            compared: whether they have been compared with a checkpoint's already.
        """
        self._known = Known(settings, compared)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit.

        Raises:
            InputError: it is not rotopo's, its settings may not be changed to these, its base
                model or its adapter is another one, it trains other parameters, its schedule had
                another length, or it was written within a step that is cut up in another way now.
        """
        ours = checkpoint.get("rotopo")
        if ours is None:
            raise InputError("ckpt_path: this checkpoint was not written by rotopo.")
        fits = self.trainer.state.fn == TrainerFn.FITTING
        self._known.compare(self.trainer, ours.get("settings"))
        refuse_another_model(self, ours, fits)
        if fits:
            self._rates.load(checkpoint)
            keep_given(callbacks_of(self.trainer), checkpoint.get("callbacks", {}))
        self.backbone.start_as(checkpoint.get("start"))
        data, found = data_if_any(self.trainer), False
        if fits and isinstance(data, PairwiseDataModule):
            self._accumulation.load(ours.get("accumulation", {}))
            found = self._accumulation.is_found(data.batching.token_budget)
        self._resumption.load(self.trainer, checkpoint, found)

    @abstractmethod
    def predict(self, batch: "PromptBatch | PairBatch") -> list[dict[str, Any]]:
        """What to write about each row of a batch."""

    def leave_out(self, rows: Container[int]) -> None:
        """Make no predictions for rows that an interrupted run has done.

        Args:
            rows: their numbers; none, once the prediction is over.
        """
        self._left_out = rows

    def predict_step(
        self, batch: "PromptBatch | PairBatch", batch_idx: int
    ) -> list[dict[str, Any]]:
        """As :meth:`predict`; nothing for a batch that an interrupted run has done."""
        done = all(row in self._left_out for row in batch.rows.tolist())
        if trainer_of(self) is not None:  # ranks that work on one model have to work together
            done = self.trainer.strategy.reduce_boolean_decision(done)
        if done:
            return []
        return self.predict(batch)

    def prediction_fingerprint(self) -> str:
        """Hash of all that a prediction follows from beside the rows: weights and settings."""
        from rotopo.models.sharding import whole

        modules = [m for m in self.modules() if isinstance(m, PairwiseModule)]
        settings = [[type(m).__name__, _settings(vars(m))] for m in modules]
        facts = [self.base_fingerprint, str(self.language_model.dtype), settings]
        digest = hashlib.sha256(json.dumps(facts).encode())
        saved = self.saved_names()
        for name, value in sorted(self.state_dict().items()):
            if name in saved:
                digest.update(name.encode())
                digest.update(whole(value).contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def on_fit_start(self) -> None:
        self._log_facts()

    def on_test_start(self) -> None:
        self._log_facts()

    def _log_facts(self) -> None:
        """Log what the run stands on: versions, base model, data."""
        # Ours by itself: the package may run from its source, with nothing installed.
        facts: dict[str, Any] = {"rotopo": rotopo.__version__}
        facts |= {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        facts |= {"base_fingerprint": self.base_fingerprint, "reward_unit": self.reward_unit}
        data = data_if_any(self.trainer)
        if isinstance(data, PairwiseDataModule):
            facts |= data.pairs.describe()
        for logger in self.trainer.loggers:
            logger.log_hyperparams(facts)

    def on_train_epoch_start(self) -> None:
        check_steps_are_whole(self.trainer)  # a selector may have changed the epoch's length
        self._accumulation.say()

    def on_train_start(self) -> None:
        """As :meth:`on_train_epoch_start`, which is not called where an epoch is resumed.

        Raises:
            InputError: a setting of the Trainer would validate, or end an epoch, within a step.
        """
        check_steps_are_whole(self.trainer)
        self._accumulation.say()
        say(self._rates.restore(self.trainer))
        self._resumption.enter(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._resumption.restore_random_state()
