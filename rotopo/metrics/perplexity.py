"""Perplexity of a text: what a policy still knows, beside its reference."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.devices import exact
from rotopo.errors import InputError
from rotopo.models.modes import evaluating

if TYPE_CHECKING:  # else rotopo --help would wait for PEFT and transformers
    from transformers import PreTrainedTokenizerBase

    from rotopo.models.policy import Policy


@torch.no_grad()
def perplexity(
    policy: "Policy",
    tokenizer: "PreTrainedTokenizerBase",
    file: Path,
    window: int = 512,
    windows_per_batch: int = 8,
) -> dict[str, Any]:
    """Perplexity of a text file under a policy and, where it has one, its reference.

    The text is tokenised whole, as it stands, with a BOS in front where the tokenizer has one that
    it adds. Windows follow one another; each sees its last predecessor's last token and its own
    past, so every token behind the first is predicted exactly once, from at most ``window`` tokens
    before it. Longer windows give lower values: compare equal ones. Under several ranks each does
    the whole text, since a divided model takes all ranks at every step.

    Args:
        policy: the policy; it is evaluated without dropout.
        tokenizer: its tokenizer.
        file: UTF-8 text, at least two tokens of it.
        window: tokens of a window.
        windows_per_batch: windows computed at once.

    Returns:
        ``file``; ``window``; ``tokens``, those predicted; ``nats_per_token``, the mean of
        −log p; ``perplexity``, its exp; and ``reference_nats_per_token`` and
        ``reference_perplexity`` with an adapter or a frozen copy.

    Raises:
        InputError: no readable text, too short a one, or a window that the model has no positions
            for; or a policy that has diverged.
    """
    for name, value in (("window", window), ("windows_per_batch", windows_per_batch)):
        if value < 1:
            raise InputError(f"{name} is {value}: it has to be at least 1.")
    config = policy.language_model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)  # some have no bound
    if positions is not None and window > positions:
        raise InputError(f"window is {window}: the model has {positions} positions only.")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable UTF-8 text: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if len(ids) < 2:
        raise InputError(f"{file}: {len(ids)} tokens of text leave nothing to predict.")

    starts = range(0, len(ids) - 1, window)
    rows = [
        TokenizedRow([ids[start]], [ids[start + 1 : start + 1 + window]], [Role.CHOSEN], number)
        for number, start in enumerate(starts)
    ]
    needs = Needs(reference=policy.has_reference, pairs=False)
    total = reference_total = 0.0
    with evaluating(policy.model):
        for first in range(0, len(rows), windows_per_batch):
            batch = collate(rows[first : first + windows_per_batch], 0, "padded", loss_scale=1.0)
            log_probs = policy(batch.to(policy.device), needs)
            total -= float(exact(log_probs.chosen).sum())
            if log_probs.reference_chosen is not None:
                reference_total -= float(exact(log_probs.reference_chosen).sum())

    if not math.isfinite(total):
        raise InputError(f"{file}: its log-probs are not finite: the policy has diverged.")
    n = len(ids) - 1
    found: dict[str, Any] = {"file": str(file), "window": window, "tokens": n}
    for prefix, nats in (("", total), ("reference_", reference_total)):
        if not prefix or needs.reference:
            found[f"{prefix}nats_per_token"] = nats / n
            found[f"{prefix}perplexity"] = math.exp(nats / n)
    return found
