"""Sharding a frozen base with an adapter: what Lightning's strategies leave to others."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.nn import Module
from torch.optim import Optimizer

from rotopo.errors import InputError
from rotopo.run import checkpoint_folders, checkpoints
from rotopo.run.checkpoint_folders import replacing
from rotopo.run.lightning import divide_among_all_ranks, talk_through, without_wrappers

if TYPE_CHECKING:  # else rotopo --help would wait for torch's distributed tensors
    from rotopo.models.sharding import Sharding


class FSDP2Strategy(ModelParallelStrategy):
    """Every rank holds a share of each weight, gradient and optimiser state.

    A decoder layer is whole on a rank only while it is computed, and the model never, not even as
    it is loaded. Checkpoints are as under any other strategy: what trains, whole, in one file that
    resumes on any number of ranks, under this strategy or another; or, for full fine-tuning of
    large models, a folder to which each rank writes its share.

    Args:
        cpu_offload: keep the shares and the optimiser's state in the processor's memory.
        save_distributed_checkpoint: write checkpoints as folders.
        process_group_backend: how the ranks talk; None is nccl for GPUs (with gloo beside it for
            what is offloaded) and gloo for processors.
        timeout: how long a rank waits for another before the run ends.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload
        self.writes_folders = save_distributed_checkpoint

    @property
    def sharding(self) -> "Sharding":
        """How a module divides its model in ``configure_model``."""
        from rotopo.models.sharding import Sharding

        return Sharding(self.device_mesh["data_parallel"], self.cpu_offload)

    def setup_environment(self) -> None:
        divide_among_all_ranks(self)
        if self.cpu_offload and self.root_device.type == "cuda" and not self.process_group_backend:
            talk_through(self, "cpu:gloo,cuda:nccl")
        super().setup_environment()

    def model_to_device(self) -> None:
        # Weights are where they belong: of what is offloaded only the buffers are not.
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: Lightning would gather the frozen base too."""
        return self._for_checkpoint(self._saved())

    def _saved(self) -> dict[str, Any]:
        """This rank's shares of what checkpoints hold."""
        module: Any = self.lightning_module
        saved = module.saved_names()
        return {name: value for name, value in module.state_dict().items() if name in saved}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """In torch's own form, so that every strategy can go on from it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        of = {number: self._for_checkpoint(values) for number, values in state["state"].items()}
        return {"state": of, "param_groups": state["param_groups"]}

    def _for_checkpoint(self, values: dict[str, Any]) -> dict[str, Any]:
        from rotopo.models.sharding import whole

        if self.writes_folders:
            return values
        kept = {}
        for name, value in values.items():
            gathered = whole(value)  # by all ranks
            if self.is_global_zero:
                kept[name] = gathered
        return kept

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if not self.writes_folders:
            if self.is_global_zero:
                with replacing(path) if path.is_dir() else nullcontext():
                    self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        checkpoint_folders.write(path, checkpoint)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore model and optimisers, each rank its share; nothing pickled is read."""
        from rotopo.models.sharding import share_of

        path = Path(self.broadcast(checkpoint_path))
        module: Any = self.lightning_module
        fits = self.optimizers if module.trainer.state.fn == TrainerFn.FITTING else []
        targets = self._saved()
        by_number = [_parameters(optimizer) for optimizer in fits]
        checkpoint = checkpoints.check(path)
        module.on_load_checkpoint(checkpoint)  # refuses before anything is changed
        if path.is_dir():
            checkpoint_folders.read(path, checkpoint, targets, by_number)
        else:
            for name, value in checkpoint["state_dict"].items():
                if name in targets and targets[name].shape == value.shape:
                    checkpoint["state_dict"][name] = share_of(value, targets[name])
            for parameters, state in zip(by_number, checkpoint["optimizer_states"], strict=False):
                for number, values in state["state"].items():
                    like = parameters[number]
                    for name, value in values.items():
                        if torch.is_tensor(value) and value.shape == like.shape:
                            values[name] = share_of(value, like)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(checkpoint["state_dict"][name])
        for optimizer, state in zip(fits, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by :meth:`load_checkpoint`."""


class FSDP1Strategy(FSDPStrategy):
    """Lightning's FSDPStrategy, whose checkpoints are those of the other strategies.

    Its own gather the frozen base each time too, and number the optimiser's state in a way that
    nothing else goes on from.

    Raises:
        InputError: there is no GPU, an adapter trains the output head or rows of tokens, the base
            is quantised to 8 bits, or ``compute_dtype`` is set.
    """

    def setup(self, trainer: Trainer) -> None:
        from rotopo.models.beside import read_outside  # slow to import

        module: Any = self.lightning_module
        config = module.model_config
        if config.compute_dtype is not None:
            raise InputError(
                f"trainer.strategy: FSDPStrategy wants one dtype in each of its units, and with "
                f"{config.setting}.compute_dtype the policy's weights are float32 and the "
                "reference's are not: take configs/strategies/fsdp2.yaml or ddp.yaml."
            )
        if read_outside(module.language_model):
            raise InputError(
                "trainer.strategy: FSDPStrategy would divide the output head, or the rows of "
                "tokens, that the adapter trains (modules_to_save, trainable_token_indices) from "
                "where they are read: take configs/strategies/fsdp2.yaml or ddp.yaml."
            )
        if module.backbone.start is not None:
            raise InputError(
                "trainer.strategy: FSDPStrategy cannot go back to where the adapter started, which "
                "is the reference here: take configs/strategies/fsdp2.yaml or ddp.yaml."
            )
        if getattr(module.language_model, "is_loaded_in_8bit", False):
            raise InputError(
                "trainer.strategy: FSDPStrategy cannot divide weights of 8 bits, only of 4: set "
                "quantize to 4bit, or take configs/strategies/ddp.yaml."
            )
        self.refuse_processors()
        super().setup(trainer)
        root: Any = self.model
        self._root = root
        # The root has to be first: a unit that is gathered before it would take its part.
        with Fsdp1.summon_full_params(root, recurse=False, writeback=False):
            pass
        # By the parameters themselves: their shapes and places change as units are gathered.
        self._names: dict[Tensor, str] = {
            parameter: without_wrappers(name)
            for name, parameter in self._root.named_parameters()
            if parameter.requires_grad
        }

    def refuse_processors(self) -> None:
        """Refuse to run without a GPU, as torch would."""
        if self.root_device.type == "cpu":
            raise InputError(
                "trainer.strategy: torch's first FSDP needs GPUs: take "
                "configs/strategies/fsdp2.yaml, which also runs on processors."
            )

    def _gathered(self, write: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Parameters that train, whole, unit by unit, by all ranks together."""
        inside: set[Tensor] = set()
        for unit in reversed(Fsdp1.fsdp_modules(self._root)):
            own = [p for p in unit.parameters() if p in self._names and p not in inside]
            inside.update(own)
            if own:
                with Fsdp1.summon_full_params(unit, recurse=False, writeback=write):
                    for parameter in own:
                        yield self._names[parameter], parameter

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module: Any = self.lightning_module
        state = {name: value.detach().cpu().clone() for name, value in self._gathered()}
        return state | {name: value.cpu() for name, value in module.named_buffers()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        with self._whole_states(rank0_only=True):
            named = Fsdp1.optim_state_dict(self._root, optimizer)
        numbers = {self._names[p]: n for n, p in enumerate(_parameters(optimizer))}
        groups = optimizer.state_dict()["param_groups"]
        return {
            "state": {numbers[name]: values for name, values in named.get("state", {}).items()},
            "param_groups": groups,
        }

    def _whole_states(self, rank0_only: bool) -> AbstractContextManager:
        """Within it, the optimiser's states are whole."""
        # On processors torch would put all of a parameter's states into one tensor.
        settings = {"offload_to_cpu": self.root_device.type != "cpu", "rank0_only": rank0_only}
        return Fsdp1.state_dict_type(
            self._root,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(**settings),
            FullOptimStateDictConfig(**settings),
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = checkpoints.read(Path(self.broadcast(checkpoint_path)))
        module: Any = self.lightning_module
        module.on_load_checkpoint(checkpoint)  # refuses before anything is changed
        with torch.no_grad():
            for name, parameter in self._gathered(write=True):
                parameter.copy_(checkpoint["state_dict"][name])
            for name, buffer in module.named_buffers():
                if name in checkpoint["state_dict"]:
                    buffer.copy_(checkpoint["state_dict"][name])
        if module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = [self._names[p] for p in _parameters(optimizer)]
            named = {
                "state": {names[n]: values for n, values in state["state"].items()},
                "param_groups": [
                    group | {"params": [names[n] for n in group["params"]]}
                    for group in state["param_groups"]
                ],
            }
            with self._whole_states(rank0_only=False):
                shares = Fsdp1.optim_state_dict_to_load(self._root, optimizer, named)
            optimizer.load_state_dict(shares)
        return checkpoint


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """As an optimiser's state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def adapter_units(module: Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDPStrategy's ``auto_wrap_policy`` for a frozen base with an adapter on it.

    Decoder layers are units, and so is each module whose own weights train: FSDP1 wants one dtype
    in a unit, and an adapter is float32 on a base that is not. Without an adapter give the layers'
    class instead, or every module would be a unit.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    own = list(module.parameters(recurse=False))
    trains = bool(own) and all(parameter.requires_grad for parameter in own)
    return recurse or trains or isinstance(module, GradientCheckpointingLayer)


class KeepDtypes(FSDPPrecision):
    """FSDPStrategy's precision where modules bring their own: Lightning's would cast a bfloat16
    base to float32, and every batch, frozen as ours are."""

    def __init__(self) -> None:
        super().__init__("32-true")

    @property
    def mixed_precision_config(self) -> Any:
        return None

    def convert_module(self, module: Module) -> Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data
