"""What the rows of a benchmark's table share: the model, and the pairs of every batch."""

import argparse
import itertools
import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rotopo.data import films
from rotopo.data.batch import Layout, Role, TokenizedRow
from rotopo.errors import InputError
from rotopo.models.loading import load_model, resolve_dtype
from rotopo.models.settings import DtypeName
from rotopo.pretrained import load_tokenizer

RANDOM = "random:"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 211,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Large enough for log-probs that a moved adapter moves.
        "initializer_range": 0.2,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


class Load(NamedTuple):
    """What a step works on: pairs, prompt plus one response in tokens, and their ratio."""

    pairs: int
    context: int
    prompt_ratio: float


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share; ``trl`` are further settings of TRL's DPOConfig."""

    model: str
    dtype: DtypeName
    device: str
    layout: Layout
    policy: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    batches: list[list[TokenizedRow]]
    trl: dict[str, Any] = field(default_factory=dict)

    def load_model(self, attention: str = "sdpa") -> PreTrainedModel:
        """The base model; every call gives the same weights."""
        dtype = resolve_dtype(self.dtype)
        if self.model.startswith(RANDOM):
            torch.manual_seed(0)
            with torch.device(self.device):
                return random_model(self.model.removeprefix(RANDOM), dtype, attention)
        model = load_model(self.model, dtype, attention)
        return model.to(self.device)  # type: ignore[arg-type]

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


def random_model(shape: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model of one of SHAPES.

    Raises:
        InputError: it has no such attention.
    """
    config = AutoConfig.for_model(**SHAPES[shape])
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attention: {attention!r} does not work here: {error}") from error


def begin(arguments: argparse.Namespace, dtype: DtypeName, loads: Iterable[Load]) -> Setting:
    """Set a process up, with a batch for each load; every process that measures begins here."""
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if arguments.model.startswith(RANDOM):
        vocabulary = SHAPES[arguments.model.removeprefix(RANDOM)]["vocab_size"]
        tokenizer, batches = _no_tokenizer(), _random_batches(vocabulary, loads)
    else:
        tokenizer = load_tokenizer(arguments.model)
        # Every peer masks by position, so any token will do for padding.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        batches = _real_batches(tokenizer, loads)
    return Setting(
        arguments.model,
        dtype,
        arguments.device,
        arguments.layout,
        arguments.policy,
        tokenizer,
        list(batches),
    )


def _no_tokenizer() -> PreTrainedTokenizerBase:
    """Three tokens: TRL wants to tokenise something, whatever its batches are made from."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="a"
    )


def _real_batches(
    tokenizer: PreTrainedTokenizerBase, loads: Iterable[Load]
) -> Iterator[list[TokenizedRow]]:
    """Pairs of critics' sentences: sentence after sentence, cut."""

    def stream(texts: Iterable[str]) -> Iterator[int]:
        for text in itertools.cycle(texts):
            yield from tokenizer(text + "\n")["input_ids"]

    pairs = films.pairs()
    half = len(pairs) // 2
    prompts = stream(pairs["chosen"][half:])
    chosen, rejected = stream(pairs["chosen"][:half]), stream(pairs["rejected"][:half])
    return _cut(prompts, chosen, rejected, loads)


def _random_batches(vocabulary: int, loads: Iterable[Load]) -> Iterator[list[TokenizedRow]]:
    """Pairs of random tokens."""
    draw = random.Random(0)
    tokens = iter(lambda: draw.randrange(vocabulary), None)
    return _cut(tokens, tokens, tokens, loads)


def _cut(
    prompts: Iterator[int], chosen: Iterator[int], rejected: Iterator[int], loads: Iterable[Load]
) -> Iterator[list[TokenizedRow]]:
    """A batch for each load, with lengths give or take a quarter."""
    draw = random.Random(0)

    def about(stream: Iterator[int], tokens: float) -> list[int]:
        return list(itertools.islice(stream, max(1, round(tokens * draw.uniform(0.75, 1.25)))))

    number = itertools.count()
    for load in loads:
        C = load.context / (1 + load.prompt_ratio)
        yield [
            TokenizedRow(
                about(prompts, load.context - C),
                [about(chosen, C), about(rejected, C)],
                [Role.CHOSEN, Role.REJECTED],
                next(number),
            )
            for _ in range(load.pairs)
        ]
