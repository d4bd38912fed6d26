"""Robustness-guided rejection sampling: new pairs for the prompts whose pairs were dropped.

ROPO's paper (arXiv 2404.04102) says what it is for: to give back what the dropped prompts would
have taught. How it goes is [ours].
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from rotopo.data.batch import Sizes
from rotopo.data.rows import Rows
from rotopo.errors import InputError
from rotopo.models.settings import Sampling
from rotopo.objectives.base import PreferenceModule
from rotopo.robust.scoring import score
from rotopo.robust.selection import best_and_worst
from rotopo.run.lightning import data_of
from rotopo.run.steps import works_in_steps_only

if TYPE_CHECKING:  # else rotopo --help would wait for PEFT and transformers
    from rotopo.models.policy import Policy

_ORIGINALS = ("chosen", "rejected")
# Dropped prompts whose responses are in memory at once.
_PROMPTS_AT_ONCE = 1000

# A prompt's responses, and where each comes from.
Pool = dict[tuple[int, ...], str]


@dataclass(frozen=True)
class Resampling:
    """How new pairs are made and accepted.

    Each dropped prompt gets K responses from the policy. Among these and its original two, the one
    of the highest implicit reward and the one of the lowest are a new pair, which is trained on if
    its loss is no larger than a quantile of the kept pairs' losses. [ours]

    Args:
        samples: K.
        temperature: τ of the sampling, above 0.
        max_new_tokens: tokens of a response at most; one that does not end by then is cut, and has
            no end-of-turn token.
        quantile: q, of the kept losses; 1 accepts up to the largest of them.
        against_chosen: only pairs with the original chosen response in them.
        seed: seed of the sampling.

    Raises:
        InputError: a setting out of its range.
    """

    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 128
    quantile: float = 0.5
    against_chosen: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise InputError(f"resampling.{name} is {value}: it has to be at least 1.")
        if not self.temperature > 0:
            raise InputError(
                f"resampling.temperature is {self.temperature}: it has to be above 0, or all "
                "samples would be the same."
            )
        if not 0 <= self.quantile <= 1:
            raise InputError(f"resampling.quantile is {self.quantile}: it lies from 0 to 1.")


@dataclass(frozen=True)
class NewPair:
    """What rejection sampling made of a prompt.

    Attributes:
        chosen, rejected: token ids.
        origin: where the two come from: ``chosen`` and ``rejected`` are the original pair's,
            ``sample 1`` to ``sample K`` the policy's.
        rewards: implicit rewards of the two.
        loss: the objective's, of the pair.
    """

    chosen: list[int]
    rejected: list[int]
    origin: tuple[str, str]
    rewards: tuple[float, float]
    loss: float


def check(trainer: Trainer, rows: Rows, settings: Resampling) -> None:
    """Whether responses can be drawn and judged one by one, and new pairs fit into a batch.

    Args:
        trainer: while it runs.
        rows: the training rows.
        settings: how new pairs will be made.

    Raises:
        InputError: why not.
    """
    module = trainer.lightning_module
    name = type(module).__name__
    if not isinstance(module, PreferenceModule):
        raise InputError(f"resampling: {name} is a reward model, which generates no responses.")
    if module.paired_rewards or module.needs.roles:
        raise InputError(
            f"resampling: {name} does not judge a pair by its two responses alone, so that new "
            "pairs cannot be chosen by it: leave resampling out, or take ROPO or DPO."
        )
    if works_in_steps_only(trainer):
        raise InputError(
            "resampling: FSDPStrategy cannot generate: leave resampling out, or take "
            "configs/strategies/fsdp2.yaml."
        )
    data = data_of(trainer)
    if data.batching.token_budget is None:
        return
    longest = []
    for prompt, responses in rows.lengths():
        sampled = min(settings.max_new_tokens, data.encoder.max_length - prompt)
        longest.append((prompt, [max(sampled, *responses)] * 2))
    sizes = Sizes(longest, data.batching.layout)
    largest = max(sizes.tokens([i]) for i in range(len(longest)))
    if largest > data.batching.token_budget:
        raise InputError(
            f"data.token_budget is {data.batching.token_budget}, but with responses of "
            f"resampling.max_new_tokens ({settings.max_new_tokens}) a new pair may take {largest} "
            "tokens: raise the one, or lower the other."
        )


def resample(
    trainer: Trainer, rows: Rows, dropped: Sequence[int], settings: Resampling
) -> list[NewPair | None]:
    """A new pair for each dropped row's prompt; None where no two responses differ in reward.

    What has been drawn is kept on disk until all new pairs are made, so that a run that is killed
    and goes on draws it once.

    Args:
        trainer: while it runs.
        rows: the training rows.
        dropped: places of those that were dropped.
        settings: how.
    """
    module = trainer.lightning_module
    assert isinstance(module, PreferenceModule)
    source = f"{module.prediction_fingerprint()} {settings}"  # hashes all that trains: once
    made: list[NewPair | None] = []
    folders = []
    for number, start in enumerate(range(0, len(dropped), _PROMPTS_AT_ONCE)):
        part = dropped[start : start + _PROMPTS_AT_ONCE]
        pools, folder = _pools(trainer, module.backbone, rows, part, settings, source, number)
        made += _new_pairs(trainer, rows, part, pools, settings.against_chosen)
        folders.append(folder)
    trainer.strategy.barrier()
    _discard(folders)  # the new pairs go into checkpoints
    return made


def _pools(
    trainer: Trainer,
    policy: "Policy",
    rows: Rows,
    dropped: Sequence[int],
    settings: Resampling,
    source: str,
    number: int,
) -> tuple[list[Pool], Path]:
    """Of each dropped row's prompt all different responses, the originals first; and the folder
    that keeps what was drawn."""
    from rotopo.models.samples import draw

    data = data_of(trainer)
    originals, K = [rows.pairs[place] for place in dropped], settings.samples
    # Another seed for each part of the prompts.
    seed = settings.seed + number
    with trainer.precision_plugin.forward_context():
        drawn, folder = draw(
            policy,
            [row["prompt"] for row in originals for _ in range(K)],
            Sampling(settings.max_new_tokens, settings.temperature, seed=seed),
            data.encoder,
            data.pairs.cache_dir / "samples",
            source,
        )
    pools: list[Pool] = []
    for i, row in enumerate(originals):
        room = data.encoder.max_length - len(row["prompt"])
        pool: Pool = {tuple(row[name]): name for name in _ORIGINALS}
        for k, ids in enumerate(drawn[i * K : (i + 1) * K], 1):
            pool.setdefault(tuple(ids[:room]), f"sample {k}")
        pools.append(pool)
    return pools, folder


def _new_pairs(
    trainer: Trainer,
    rows: Rows,
    dropped: Sequence[int],
    pools: Sequence[Pool],
    against_chosen: bool,
) -> list[NewPair | None]:
    rewards = _rewards(trainer, rows, dropped, [list(pool) for pool in pools])
    best, worst, differ = best_and_worst(rewards, against_chosen)
    made: list[NewPair | None] = [None] * len(pools)
    numbers = np.flatnonzero(differ).tolist()
    pairs = []
    for number in numbers:
        responses = list(pools[number])
        chosen, rejected = responses[best[number]], responses[worst[number]]
        pairs.append((dropped[number], list(chosen), list(rejected)))
    losses = score(trainer, rows.select([], pairs), "Scoring new pairs").losses if pairs else ()
    for number, (_, chosen, rejected), loss in zip(numbers, pairs, losses, strict=True):
        origins, i, j = list(pools[number].values()), best[number], worst[number]
        two = float(rewards[number, i]), float(rewards[number, j])
        made[number] = NewPair(chosen, rejected, (origins[i], origins[j]), two, float(loss))
    return made


def _rewards(
    trainer: Trainer, rows: Rows, dropped: Sequence[int], pools: list[list[tuple[int, ...]]]
) -> np.ndarray:
    """Implicit rewards of all responses, NaN behind a prompt's last [P, C]."""
    pairs = []
    places: list[tuple[int, int, int]] = []  # of each pair: the prompt, and its two responses
    for number, (place, pool) in enumerate(zip(dropped, pools, strict=True)):
        for i in range(0, len(pool), 2):
            j = i + 1 if i + 1 < len(pool) else 0  # the odd one out has the first beside it
            pairs.append((place, list(pool[i]), list(pool[j])))
            places.append((number, i, j))
    scores = score(trainer, rows.select([], pairs), "Scoring samples")
    rewards = np.full((len(pools), max(map(len, pools))), np.nan)
    numbers, first, second = np.array(places).T
    rewards[numbers, second] = scores.rejected
    rewards[numbers, first] = scores.chosen
    return rewards


@rank_zero_only
def _discard(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
