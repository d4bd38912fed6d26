"""FSDP1 without a GPU: torch can, if it is told the device."""

from typing import Any
from unittest import mock

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rotopo.strategies import FSDP1Strategy


class FSDPOnProcessors(FSDP1Strategy):
    def setup_environment(self) -> None:
        FSDPStrategy.setup_environment(self)  # ours refuses processors

    def _setup_model(self, model: nn.Module) -> nn.Module:
        original = FullyShardedDataParallel.__init__

        def init(self: Any, *arguments: Any, **settings: Any) -> None:
            original(self, *arguments, **settings | {"device_id": torch.device("cpu")})

        with mock.patch.object(FullyShardedDataParallel, "__init__", init):
            return super()._setup_model(model)
