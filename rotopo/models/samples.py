"""Responses drawn from a policy or its reference, in parts that are kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rotopo import ranks
from rotopo.data.batch import collate_prompts
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from rotopo.files import write_whole
from rotopo.models.policy import Policy
from rotopo.models.settings import Sampling
from rotopo.progress import Progress

_PROMPTS_AT_ONCE = 64
# How responses are drawn, a part of the hash: what was drawn in another way is not taken for them.
_DRAWN = "a generator for each row"


def sample_reference(
    policy: Policy,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    encoder: PairEncoder,
    cache_dir: Path,
    seed: int,
) -> list[list[int]]:
    """One response of the reference to each prompt, at temperature 1 from the whole distribution;
    see :func:`draw`."""
    sampling = Sampling(max_new_tokens, temperature=1.0, seed=seed)
    source = policy.reference_fingerprint
    return draw(policy, prompts, sampling, encoder, cache_dir, source, reference=True)[0]


def draw(
    policy: Policy,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    encoder: PairEncoder,
    cache_dir: Path,
    source: str,
    reference: bool = False,
) -> tuple[list[list[int]], Path]:
    """One response to each prompt; a prompt that is there several times gets as many.

    Responses are kept on disk under a hash of the model, the prompts and every setting, in parts of
    a few prompts each, so that a run that dies loses only the part at hand; the ranks share the
    parts among them. Each response has random numbers of its own, by the seed and its place.

    Args:
        policy: who responds.
        prompts: token ids.
        sampling: how; a response that does not end within ``max_new_tokens`` is cut, and has no
            end-of-turn token.
        encoder: how prompts became tokens.
        cache_dir: where to keep the responses.
        source: hash of the weights that they are drawn from.
        reference: draw from the policy's reference instead.

    Returns:
        token ids of each response, with the end-of-turn token; and the folder that keeps them.

    Raises:
        InputError: another rank's responses are not in this rank's cache folder, or a file in it
            is damaged.
    """
    settings = [_DRAWN, source, vars(sampling), encoder.stop_ids, encoder.end_of_turn_id]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for prompt in prompts:
        digest.update(np.array([len(prompt), *prompt], dtype=np.int64).tobytes())
    folder = cache_dir / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)

    parts = in_parts(prompts)
    files = [folder / f"{number}.json" for number in range(len(parts))]
    # One rank decides for all, since files come while others look.
    missing = ranks.of_first([n for n in range(len(parts)) if not files[n].exists()])
    turns = -(-len(missing) // ranks.count())
    mine = missing[ranks.number() :: ranks.count()]
    if policy.sharding is not None:  # every rank has to work whenever one does
        mine += missing[: turns - len(mine)]
    whose = "the reference" if reference else "the policy"
    hidden = not mine or ranks.number() > 0
    for number in Progress(mine, f"Sampling {whose}", hidden=hidden):
        ended = responses_to(policy, prompts, parts[number], sampling, encoder, reference)
        write_whole(files[number], json.dumps(ended))
    ranks.wait()

    samples: list[list[int]] = [[] for _ in prompts]
    for file, part in zip(files, parts, strict=True):
        if not file.exists():
            raise InputError(
                f"data.cache_dir: {file.name} of another rank's samples is not in {folder}: let "
                "data.cache_dir or $ROTOPO_CACHE name a folder that all nodes share, and no other "
                "run make the same samples meanwhile."
            )
        try:
            drawn = json.loads(file.read_text("utf-8"))
            if [type(token) for ids in drawn for token in ids].count(int) != sum(map(len, drawn)):
                raise TypeError("not all of it is token ids")
            for i, ids in zip(part, drawn, strict=True):
                samples[i] = ids
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{file} is damaged: remove it, and these responses are drawn again. ({error})"
            ) from error
    return samples, folder


def in_parts(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Places of the prompts that are responded to together: of similar lengths, which is less
    padding, and equal ones, which are read once."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    return [order[i : i + _PROMPTS_AT_ONCE] for i in range(0, len(order), _PROMPTS_AT_ONCE)]


def responses_to(
    policy: Policy,
    prompts: Sequence[list[int]],
    places: Sequence[int],
    sampling: Sampling,
    encoder: PairEncoder,
    reference: bool = False,
) -> list[list[int]]:
    """Responses to the prompts at some places, with the end-of-turn token where they ended; see
    :func:`draw`."""
    batch = collate_prompts([prompts[i] for i in places], encoder.pad_id, places)
    responses = policy.generate(
        batch.to(policy.device), sampling, encoder.stop_ids, reference=reference
    )
    most = sampling.max_new_tokens
    return [ids + [encoder.end_of_turn_id] * (len(ids) < most) for ids in responses]
