"""The conftest.py beside PEFT's released tests, which test_released.py lays in a folder of its own:
their cases of HRA, the tuner that is most like ours, become cases of the rotation."""

import sys
from pathlib import Path
from types import ModuleType

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
)

from rotopo.rotation import RotationConfig

# They import it for one class, which no case here needs.
sys.modules["diffusers"] = ModuleType("diffusers")
sys.modules["diffusers"].StableDiffusionPipeline = type("Unused", (), {})


class Mixed(RotationConfig):
    """Stands for RoAd, the one tuner of theirs beside LoRA that takes `adapter_names`."""

    def __init__(self, group_size: int = 0, variant: str = "", **settings):
        super().__init__(**settings)


peft.HRAConfig, peft.RoadConfig = RotationConfig, Mixed

from released import test_decoder_models as decoders  # noqa: E402
from released import test_seq_classifier as classifiers  # noqa: E402
from released import testing_common as common  # noqa: E402

# Their lists of methods that can do it: Conv1D, and mixed batches of a decoder.
common._skip_if_conv1d_not_supported = lambda *_: None
decoders.LoraConfig = RotationConfig

# Models of the same kinds in the place of the hub's.
size = {"vocab_size": 300, "pad_token_id": 0}
llama = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **size
)
gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, **size)
folder = Path(__file__).parent / "models"
for name, config in {"llama": llama, "gpt2": gpt2}.items():
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / f"{name}-score")
decoders.PEFT_DECODER_MODELS_TO_TEST[:] = [str(folder / "llama"), str(folder / "gpt2")]
classifiers.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = [
    str(folder / "llama-score"),
    str(folder / "gpt2-score"),
]
