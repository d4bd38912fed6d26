"""The README.md of an exported model: what it is, how to load it, what was trained and measured."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rotopo.export.job import Kind
from rotopo.export.loading_code import loading_code
from rotopo.metrics.runs import Test, Training

# Of the Trainer, where and how a run was watched, which is nothing that its weights follow from.
_ASIDE = ("default_root_dir", "logger", "enable_progress_bar", "enable_model_summary", "profiler")
_VERSIONS = ("rotopo", "torch", "transformers", "peft")
_WHAT = {
    "merged": "A causal language model: the base model with what was trained merged into it.",
    "adapter": "An adapter of PEFT, to be put on its base model.",
    "reward": "A reward model: one number for a conversation, the higher the better.",
}
_LIMITS = {
    "policy": "The rewards above are the objective's implicit ones, and an accuracy is the share "
    "of held-out pairs whose chosen response has the higher one. They say how far the model has "
    "learnt these preferences, and nothing of how good, true or safe its responses are.",
    "reward": "An accuracy is the share of held-out pairs whose chosen response has the higher "
    "reward. Rewards of responses to different prompts are not comparable, and neither are those "
    "of texts unlike the data's; a policy that is trained against a reward model finds its faults.",
}


@dataclass(frozen=True)
class Card:
    """What a card is written from; what is None or missing in it is left out.

    Attributes:
        name: of the export's folder.
        kind: ``merged``, ``adapter`` or ``reward``.
        settings: the run's ``config.yaml``.
        facts: its ``hparams.yaml``.
        training: its metrics.
        test: a test of the same checkpoint.
        checkpoint: which one, in words.
        step: optimiser steps behind it.
        trained: parameters that were trained.
        parameters: those of the whole model, an adapter's included.
        dtype: of the weights in the export.
        checks: what the written files were compared in with the trained module, and the result.
        base: path of the base model.
        adapter: class of the adapter that trained; None of full fine-tuning.
        template: the name of the chat template, where the tokenizer has several.
    """

    name: str
    kind: Kind
    settings: dict[str, Any]
    facts: dict[str, Any]
    training: Training | None
    test: Test | None
    checkpoint: str
    step: int
    trained: int
    parameters: int
    dtype: str
    checks: list[str]
    base: str
    adapter: str | None
    template: str | None = None

    @property
    def module(self) -> dict[str, Any]:
        return self.settings["model"]["init_args"]

    @property
    def backbone(self) -> dict[str, Any]:
        """Settings of the policy, or of the reward model's backbone."""
        return self.module["backbone" if self.kind == "reward" else "policy"]

    @property
    def data(self) -> dict[str, Any]:
        return self.settings["data"]["init_args"]


def model_card(card: Card) -> str:
    """The text of README.md.

    Whatever comes from a run stands in code spans and blocks, where neither Markdown nor HTML
    means anything.
    """
    return (
        "\n\n".join(
            [
                _front_matter(card),
                f"# {_code(card.name)}",
                f"{_WHAT[card.kind]} Made by rotopo from {_code(card.backbone['path'])}.",
                "## How to load it",
                _fenced(
                    "python",
                    loading_code(card.name, card.kind, card.template, card.base, card.adapter),
                ),
                "## What was trained",
                _table(("", ""), _subject(card)),
                "## How",
                _table(("", ""), _training(card)),
                "All settings that are not null:",
                _fenced("yaml", yaml.safe_dump(_without_nulls(_settings(card)), sort_keys=False)),
                *_measured(card),
                "## Check of these files",
                *card.checks,
                "## Limits",
                *_without_remedies(card),
                _LIMITS["reward" if card.kind == "reward" else "policy"]
                + " One run with one seed. The base model's limits and licence hold here too.",
            ]
        )
        + "\n"
    )


def _front_matter(card: Card) -> str:
    base = card.base
    # The Hub links names of its own, and refuses others.
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) is not None
    fields = {
        "library_name": "peft" if card.kind == "adapter" else "transformers",
        **({"base_model": base} if on_hub else {}),
        "pipeline_tag": "text-classification" if card.kind == "reward" else "text-generation",
        "tags": ["rotopo", "reward-model" if card.kind == "reward" else "preference-optimisation"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _sources(source: str | list[str | dict[str, Any]]) -> str:
    """Where the pairs are from: one source, or several."""
    listed = [source] if isinstance(source, str) else source
    return ", ".join(_code(one if isinstance(one, str) else one["source"]) for one in listed)


def _subject(card: Card) -> list[tuple[str, str]]:
    adapter, noise, facts = card.adapter, card.data.get("noise"), card.facts
    share = card.trained / card.parameters
    rows = [
        ("objective", _code(card.settings["model"]["class_path"])),
        ("adapter", "none: full fine-tuning" if adapter is None else _code(adapter)),
        ("parameters trained", f"{card.trained:,} of {card.parameters:,} ({share:.3%})"),
        ("pairs from", _sources(card.data["source"])),
    ]
    if "mixture" in facts:
        rows.append(("mixed", str(facts["mixture"])))
    for split in ("train", "validation", "test"):
        if f"pairs/{split}" in facts:
            rows.append((f"pairs, {split}", f"{int(facts[f'pairs/{split}']):,}"))
    if "fingerprint" in facts:
        rows.append(("fingerprint of the training pairs", _code(facts["fingerprint"])))
    if noise is not None:
        rows.append(("label noise in training", _code(noise["class_path"])))
    if "noise/flipped" in facts:
        rows.append(("labels flipped by it", f"{int(facts['noise/flipped']):,}"))
    if "base_fingerprint" in facts:
        rows.append(("fingerprint of the base model", _code(facts["base_fingerprint"])))
    return rows


def _training(card: Card) -> list[tuple[str, str]]:
    optimizer, scheduler = card.module.get("optimizer"), card.module.get("scheduler")
    trainer, pairs = card.settings.get("trainer", {}), card.data["pairs_per_step"]
    rows = []
    if optimizer is not None:
        rate = optimizer.get("init_args", {}).get("lr")
        at = "" if rate is None else f", learning rate {_code(rate)}"
        rows.append(("optimiser", _code(optimizer["class_path"]) + at))
    rows.append(("schedule", "constant" if scheduler is None else _code(scheduler["class_path"])))
    rows.append(("steps", f"{card.step:,}, of {_code(pairs)} pairs each"))
    if "pairs/train" in card.facts:
        epochs = card.step * pairs / int(card.facts["pairs/train"])
        rows.append(("times through the pairs", f"{epochs:.2f}"))
    rows.append(("checkpoint", _code(card.checkpoint)))
    if card.settings.get("seed_everything") is not None:
        rows.append(("seed", _code(card.settings["seed_everything"])))
    rows.append(("base model's dtype in training", _code(card.backbone["dtype"])))
    if trainer.get("precision") is not None:
        rows.append(("Trainer's precision", _code(trainer["precision"])))
    rows.append(("dtype of these weights", card.dtype))
    versions = [f"{n} {card.facts[n]}" for n in _VERSIONS if n in card.facts]
    if versions:
        rows.append(("versions", _code(", ".join(versions))))
    return rows


def _settings(card: Card) -> dict[str, Any]:
    trainer = card.settings.get("trainer", {})
    shown = {name: card.settings.get(name) for name in ("seed_everything", "model", "data")}
    return {**shown, "trainer": {k: v for k, v in trainer.items() if k not in _ASIDE}}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _measured(card: Card) -> list[str]:
    """What the run logged last up to the checkpoint, and a test's results."""
    parts = []
    if card.training is not None:
        # What is logged with step s was measured before or at the end of optimiser step s + 1.
        rows: list[tuple[str, ...]] = []
        for split, title in (("train", "training"), ("val", "validation")):
            for column in card.training.metrics:
                if column.startswith(f"{split}/"):
                    values = card.training.logged(column).loc[: card.step - 1]
                    if len(values):
                        name = column.removeprefix(f"{split}/")
                        last = (f"{values.iloc[-1]:.4g}", f"{int(values.index[-1]) + 1:,}")
                        rows.append((title, _code(name), *last))
        if rows:
            parts.append("Logged last, up to the checkpoint (training: means of single steps):")
            parts.append(_table(("", "metric", "value", "step"), rows))
    if card.test is not None:
        found = card.test.metrics
        low, high = found["accuracy_interval"]
        parts.append("Test of this checkpoint:")
        results = [
            ("pairs", f"{found['pairs']:,}"),
            ("accuracy", f"{found['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"),
            ("reward, mean", f"{found['reward_mean']:.4g}"),
            ("reward, standard deviation", f"{found['reward_std']:.4g}"),
        ]
        parts.append(_table(("", ""), results))
    return ["## What was measured", *parts] if parts else []


def _without_remedies(card: Card) -> list[str]:
    set_ones = [name for name in ("length_alpha", "length_penalty") if card.module.get(name)]
    if card.kind != "reward" or not set_ones:
        return []
    remedies = " and ".join(f"{_code(name)} {_code(card.module[name])}" for name in set_ones)
    return [
        "These files give the head's reward, without the length remedies that it was trained and "
        f"measured with: {remedies}."
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    # Bars divide cells, within code spans too.
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [head, ("---",) * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Any) -> str:
    """A code span of any text."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fenced(language: str, text: str) -> str:
    """A code block of any text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
