"""A reward model that a run has trained, as a judge of single responses."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.messages import Message
from rotopo.data.schemas import read_response
from rotopo.errors import InputError
from rotopo.load import parts
from rotopo.reward import RewardModule
from rotopo.run.checkpoints import read
from rotopo.run.settings import for_command


class RewardJudge:
    """The reward of a response, as ``rotopo predict`` gives it by the same checkpoint.

    The model is loaded when it is first asked, on a GPU where there is one, and stays.

    Args:
        checkpoint: of a run that has trained a :class:`rotopo.reward.RewardModule`.

    Raises:
        InputError: there is no such checkpoint, or it is no reward model's.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        if not checkpoint.exists():
            raise InputError(f"RewardJudge: there is no checkpoint {checkpoint}.")
        self._parts: tuple[RewardModule, Any] | None = None

    @torch.no_grad()
    def __call__(self, prompt: list[Message], response: str) -> float:
        """The reward.

        Args:
            prompt: messages.
            response: the text that answers them.
        """
        module, encoder = self._parts = self._parts or self._load()
        preference = read_response({"prompt": prompt, "response": response})
        pair = encoder.truncate(encoder.encode(preference))[0]
        row = TokenizedRow(pair.prompt, [[*pair.chosen, encoder.pad_id]], [Role.CHOSEN], 0)
        batch = collate([row], encoder.pad_id, "padded", 1.0).to(module.backbone.device)
        return float(module.response_rewards(batch))

    def _load(self) -> tuple[RewardModule, Any]:
        state = read(self.checkpoint, optimizers=False)
        settings = json.dumps(for_command("test", state["rotopo"]))
        seed = os.environ.get("PL_GLOBAL_SEED")
        # The run that asks goes on with its own random numbers, and trains.
        with isolate_rng(), torch.inference_mode(False):
            module, data, _ = parts(settings)
            if not isinstance(module, RewardModule):
                raise InputError(
                    f"RewardJudge: {self.checkpoint} is of {type(module).__name__}, which is no "
                    "reward model."
                )
            module.configure_model()
            module.on_load_checkpoint(state)
            module.load_state_dict(state["state_dict"], strict=False)
        if seed is None:
            os.environ.pop("PL_GLOBAL_SEED", None)
        else:
            os.environ["PL_GLOBAL_SEED"] = seed
        data.take_clock(state)
        module.eval()
        if torch.cuda.is_available():
            module.cuda()
        return module, data.encoder
