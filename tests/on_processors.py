"""FSDP1 without a GPU: torch can, if it is told the device."""

from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rotopo.strategies import FSDP1Strategy


class FSDPOnProcessors(FSDP1Strategy):
    def refuse_processors(self) -> None:
        """Torch is told the device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        original = FullyShardedDataParallel.__init__

        def init(self: Any, *arguments: Any, **settings: Any) -> None:
            original(self, *arguments, **settings | {"device_id": torch.device("cpu")})

        with mock.patch.object(FullyShardedDataParallel, "__init__", init):
            return super()._setup_model(model)
