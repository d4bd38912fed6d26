"""Comparisons of the written files with the trained module: outputs, and tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer

from rotopo.data.schemas import Preference
from rotopo.data.template import clock_stopped
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from rotopo.export.job import Job, dtype_of
from rotopo.export.outputs import largest_difference, written_outputs
from rotopo.export.weights import Trained, load_written

# What the written model may differ by from the trained one, as a share of the largest logit (of a
# reward model: of a reward's scale): rounding of two ways to compute the same in float32. Sums of
# more than 1,024 products, the hidden size, round by the root more [ours].
_TOLERANCE = 1e-5
# The same where merged weights are rounded to a half type, in its machine epsilons [ours].
_HALF_TOLERANCE = 8


def check_outputs(job: Job, trained: Trained, folder: Path) -> str:
    """Compare the written files with the trained module; the result as a sentence."""
    found = written_outputs(load_written(job, folder), job)
    difference = largest_difference(trained.outputs, found)
    share, allowed = difference / trained.scale, _tolerance(job, trained)
    what = "rewards" if job.kind == "reward" else "logits"
    compared = f"{what} of {len(found)} responses to {len(job.probes)} prompts ({job.split})"
    if not share <= allowed:
        raise InputError(
            f"output: the written files do not say what was trained: {compared} differ by up to "
            f"{difference:.3g}, {share:.2g} of their scale, and {allowed:.2g} is allowed. "
            "Nothing was kept."
        )
    of = "the rewards' scale" if job.kind == "reward" else "the largest"
    against = "" if trained.moved is None else f" Training moved them by up to {trained.moved:.3g}."
    return (
        f"{compared[0].upper()}{compared[1:]}: loaded again, they differ from the trained module's "
        f"by at most {difference:.2g}, {share:.1g} of {of} ({allowed:.1g} is allowed)." + against
    )


def _tolerance(job: Job, trained: Trained) -> float:
    """What outputs may differ by, as a share of their scale."""
    as_trained = job.config.adapter is None and job.written == dtype_of(job.config.dtype)
    if job.written != job.wide and not as_trained:
        return _HALF_TOLERANCE * torch.finfo(job.written).eps
    return _TOLERANCE * max(1.0, (trained.hidden_size / 1024) ** 0.5)


def check_tokens(job: Job, folder: Path) -> Iterator[str]:
    """Compare what the written chat template makes of the probes with the tokens of training.

    The prompts' have to be the same. A whole conversation may be cut into other tokens where a
    response begins, since training tokenises it by itself, as a model generates it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder, n, same = job.data.encoder, 0, 0
    for probe in job.probes:
        preference = probe.preference
        pair = encoder.encode(preference)
        prompt = _template_ids(encoder, tokenizer, preference, [])
        if prompt != pair.prompt:
            raise InputError(
                f"output: the written chat template makes other tokens of row {probe.row.row}'s "
                f"prompt than training had: {_first_difference(prompt, pair.prompt)}. Nothing was "
                "kept."
            )
        for turns, ids in ((preference.chosen, pair.chosen), (preference.rejected, pair.rejected)):
            if turns is None:
                continue
            whole = _template_ids(encoder, tokenizer, preference, turns)
            expected = pair.prompt + ids
            found, meant = (str(tokenizer.decode(ids)) for ids in (whole, expected))
            # A policy's template goes on after the end of turn, or leaves that to the eos.
            alike = found.startswith(meant) or meant.startswith(found)
            if not (found == meant if job.kind == "reward" else alike):
                raise InputError(
                    f"output: the written chat template writes the conversation of row "
                    f"{probe.row.row} differently from training: "
                    f"{_first_difference(whole, expected)}. Nothing was kept."
                )
            if job.kind != "reward":
                whole, expected = whole[: len(expected)], expected[: len(whole)]
            n, same = n + 1, same + (whole == expected)
    yield (
        f"Tokens by the written chat template: those of training for {len(job.probes)} of "
        f"{len(job.probes)} prompts and for {same} of {n} conversations."
    )
    if same < n:
        yield (
            "The other conversations are cut into other tokens where a response begins: training "
            "tokenises a response by itself, as a model generates it."
        )


def _template_ids(
    encoder: PairEncoder, tokenizer: Any, preference: Preference, response: list[Any]
) -> list[int]:
    """Tokens of a prompt, or of it with a response, by the written template."""
    template, inputs = encoder.template, preference.inputs
    messages = template.prepared(preference.prompt + response)

    def ids(messages: list[Any]) -> list[int]:
        return tokenizer.apply_chat_template(
            messages,
            tools=inputs.tools,
            chat_template=template.name,
            add_generation_prompt=not response,
            tokenize=True,
            return_dict=False,
            **inputs.kwargs,
        )

    # Written at another time, it would say so.
    with clock_stopped(template.time if template.reads_clock else None):
        try:
            return ids(messages)
        except (jinja2.UndefinedError, TypeError):  # of a call without a content, as in training
            return ids([{"content": "", **turn} for turn in messages])


def _first_difference(found: list[int], expected: list[int]) -> str:
    at = next(
        (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )
    return f"token {at} (from 0) is {found[at : at + 1]}, and was {expected[at : at + 1]}"
