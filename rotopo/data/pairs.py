"""Pairs: the rows of all sources as tokenised pairs, divided into splits and labelled for
training."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rotopo.data.balance import balanced
from rotopo.data.batch import Role
from rotopo.data.mixture import SourceMixture
from rotopo.data.noise import LabelNoise, TrainingPairs, with_flips
from rotopo.data.one_source import OneSource, Reading, left_out
from rotopo.data.parts import Parts, join
from rotopo.data.rows import pair_lengths, prompts_alone
from rotopo.data.schemas import Preference
from rotopo.data.settings import at_least, one_of, refuse, seed_in_range
from rotopo.data.tokenized import TokenizedPair
from rotopo.data.tokens import OnBadRow, OnUnwritten, PairEncoder
from rotopo.errors import InputError, at_once
from rotopo.pretrained import Positions, load_tokenizer, positions

if TYPE_CHECKING:  # else rotopo --help would wait for datasets, pandas and pyarrow
    from datasets import Dataset

# Responses that a column of the source may hold beside the pair, by the setting's name for them.
EXTRA_ROLES = {"gold": Role.GOLD, "reference_sample": Role.REFERENCE_SAMPLE}


@dataclass(eq=False)
class Pairs:
    """The pairs of a run. Settings are those of :class:`rotopo.data.module.PairwiseDataModule`.

    Rows of several sources are numbered through, in the order of the sources.

    Attributes:
        tokenizer_path: of the tokenizer.
        encoding: how its encoder writes, see :class:`rotopo.data.tokens.PairEncoder`.
        sources: of the training pairs, and of what is held out of them.
        sets: of ``validation`` and ``test`` the further sets of pairs.
        labels: of ``train``, ``validation`` and ``test`` what the pairs of each of ``sources`` are
            called by in metrics; None where there is but one.
        say, warn: what tells the user something, and what warns.
        parts: of ``train``, ``validation`` and ``test``.
        of: their pairs, where there are any.
        labelled: the training pairs before noise and balance.
    """

    tokenizer_path: str
    encoding: dict[str, Any]
    sources: Sequence[OneSource]
    sets: Mapping[str, Sequence[OneSource]]
    labels: Mapping[str, Sequence[str | None]]
    split_seed: int
    extra_responses: dict[str, str]
    train_pairs: int | None
    balance_lengths: bool
    noise: LabelNoise | None
    accuracy_by: str | None
    template_time: str | None
    split_dialogues: bool
    on_bad_row: OnBadRow
    on_unwritten: OnUnwritten
    num_proc: int | None
    cache_dir: Path
    say: Callable[[str], None]
    warn: Callable[[str], None]
    parts: dict[str, Parts] = field(default_factory=dict)
    of: "dict[str, Dataset]" = field(default_factory=dict)
    labelled: "Dataset | None" = None

    def __post_init__(self) -> None:
        with at_once() as check:
            for name in ("train_pairs", "num_proc"):
                check(at_least, name, getattr(self, name), 1)
            check(seed_in_range, "split_seed", self.split_seed)
            check(at_least, "max_length", self.encoding["max_length"], 3)
            check(one_of, "on_bad_row", self.on_bad_row, OnBadRow)
            check(one_of, "on_unwritten", self.on_unwritten, OnUnwritten)
            for role in self.extra_responses.keys() - EXTRA_ROLES:
                check(
                    refuse, f"data.extra_responses: {role!r} is none of {', '.join(EXTRA_ROLES)}."
                )
            if self.train_pairs is not None and len(self.sources) > 1:
                check(refuse, "data.train_pairs: of several sources, give each its rows.")
        self._asked: set[str] = set()  # columns of the source that were asked for by name

    @property
    def source(self) -> str:
        """Where the rows come from, in words."""
        return ", ".join(dict.fromkeys(one.path for one in self.sources))

    @property
    def all_sources(self) -> list[OneSource]:
        """Those of training, and of the further sets."""
        return [*self.sources, *(one for sets in self.sets.values() for one in sets)]

    @cached_property
    def encoder(self) -> PairEncoder:
        """How preferences become tokens; its ``tokenizer`` is the one to save with a model."""
        settings = self.encoding | {"template_time": self.template_time}
        return PairEncoder(load_tokenizer(self.tokenizer_path), **settings)

    @cached_property
    def positions(self) -> Positions | None:
        """How far the model counts; None where it has no limit, or is not at hand."""
        return positions(self.tokenizer_path)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenised training pairs; of the others where there are none."""
        from rotopo.data.token_cache import fingerprint_rows

        return fingerprint_rows(self.of.get("train") or next(iter(self.of.values())))[:16]

    def training(self) -> "Dataset":
        """The training pairs.

        Raises:
            InputError: all are held out.
        """
        if "train" not in self.of:
            raise InputError("data.validation or data.test is 1: there is no pair to train on.")
        return self.of["train"]

    def load(self) -> None:
        """Read and tokenise all splits, or look them up in the cache."""
        reading = Reading(
            self.encoder,
            self.cache_dir,
            self.num_proc,
            self.on_bad_row,
            self.on_unwritten,
            self.extra_responses,
            self.split_dialogues,
            self.stop_clock,
            self.say,
        )
        for source in self.sources:
            source.load(reading)
        for name, sets in self.sets.items():
            for one in sets:
                try:
                    one.load(reading)
                except InputError as error:
                    raise InputError(f"data.{name}.{one.name}: {error}") from error

    def divide(self) -> None:
        """Divide the rows into ``of``, and label the training pairs.

        Raises:
            InputError: a split has no pair left, or two share a group; paired and unpaired
                sources; a source has no pairs for its share.
        """
        self.load()
        for source in self.all_sources:
            for split, one in source.loaded.items():
                self.say(f"{source.path} [{split}]: {one.tokenized.summary()}.")
        for name in ("train", "validation", "test"):
            sources = [*zip(self.sources, self.labels[name], strict=True)]
            sources += [(one, one.name) for one in self.sets.get(name, ())]
            if (joined := join(name, sources)) is not None:
                self.parts[name], self.of[name] = joined
        several = [parts.in_words() for parts in self.parts.values() if len(parts) > 1]
        for numbers in dict.fromkeys(several):
            names = [n for n, parts in self.parts.items() if parts.in_words() == numbers]
            self.say(f"Rows are numbered through ({', '.join(names)}): {numbers}.")
        self._refuse_shared_groups()
        if "train" in self.of:
            self._label()
            if (mixture := self.mixture()) is not None:
                self.say(f"data.source: {mixture.describe()}.")
        for source in self.all_sources:
            if unread := self._unread(source):
                self.say(f"{source.path}: columns that nothing reads: {', '.join(unread)}.")

    def _refuse_shared_groups(self) -> None:
        """Sets that are splits of a training's source may share groups with it."""
        for name, sets in self.sets.items():
            for one in sets:
                for source in (source for source in self.sources if source.path == one.path):
                    if shared := one.groups(name) & source.groups("train"):
                        raise InputError(
                            f"data.group_by: the {one.settings.group_by} {min(shared)} is in train "
                            f"and in data.{name}.{one.name}: hold out a share instead."
                        )

    def mixture(self, rows: "Dataset | None" = None) -> SourceMixture | None:
        """How an epoch mixes the sources; None of a single one that each epoch has once.

        Args:
            rows: what the epoch's pairs are of; None for all training pairs.
        """
        return self.parts["train"].mixture(self.of["train"] if rows is None else rows)

    def _label(self) -> None:
        """Choose, flip and balance the training pairs, as far as settings say so."""
        if self.train_pairs is not None:
            train = self.of["train"]
            order = self.sources[0].splits.permutation(len(train))[: self.train_pairs]
            self.of["train"] = train.select(np.sort(order))
        self.labelled = self.of["train"]
        if self.noise is not None:
            train = self.of["train"]
            numbers = np.asarray(train.with_format("numpy")["row"][:])
            columns = partial(self.column, "train", setting="data.noise")
            flipped = self.noise.flips(TrainingPairs(numbers, *pair_lengths(train), columns))
            self.of["train"] = with_flips(train, flipped)
            self.say(
                f"data.noise: {type(self.noise).__name__} flipped {flipped.sum()} of "
                f"{len(flipped)} labels ({100 * flipped.mean():.1f} %)."
            )
        if self.balance_lengths:
            train = self.of["train"]
            chosen, rejected = pair_lengths(train)
            part_of = self.parts["train"].of_rows(train["row"][:])
            drawn: list[int] = []
            for place in range(len(self.parts["train"])):  # so that each source keeps its share
                own = np.flatnonzero(part_of == place)
                drawn += own[balanced(chosen[own], rejected[own], self.split_seed)].tolist()
            self.of["train"] = train.select(drawn)
            self.say(f"data.balance_lengths: {len(drawn)} pairs drawn from {len(train)}.")

    def _unread(self, source: OneSource) -> list[str]:
        """Columns of a source that have no meaning to the run, each once."""
        asked = {
            *(source.settings.group_by, source.settings.margin, self.accuracy_by),
            *self.extra_responses.values(),
            *self._asked,
        }
        return [column for column in source.unread_columns() if column not in asked]

    def unread_columns(self) -> list[str]:
        """Columns of the sources that have no meaning to the run, each once."""
        return list(dict.fromkeys(c for source in self.all_sources for c in self._unread(source)))

    def refuse_unwritten(self) -> None:
        """Say what the chat template leaves out of rows, and refuse what matters.

        Raises:
            InputError: there is such a thing, and ``data.on_unwritten`` is ``error``.
        """
        for source in self.all_sources:
            found = left_out([source])
            if self.on_unwritten == "error":
                for part in (part for part in found.values() if part.refused):
                    raise InputError(
                        f"{source.path}: {part.first} ({part.rows} rows). Give a template that "
                        "does (data.chat_template), change the rows, or set data.on_unwritten to "
                        "'warn'."
                    )
            for label, part in found.items():
                say = self.warn if part.refused else self.say
                say(
                    f"{source.path}: not written by the chat template: {label}, in {part.rows} "
                    "rows."
                )

    def flipped(self) -> np.ndarray | None:
        """Which training pairs ``noise`` has flipped the labels of, in the order in which they are
        stored [N]; None without noise, or without training pairs."""
        if self.noise is None or "train" not in self.of:
            return None
        return np.asarray(self.of["train"].with_format("numpy")["flipped"][:])

    def preference(
        self, name: str, row: int, extra_responses: Mapping[str, str] | None = None
    ) -> Preference:
        """A row as messages, labelled as in the source, whatever ``noise`` flips.

        Args:
            name: ``train``, ``validation`` or ``test``.
            row: its number there.
            extra_responses: columns of further responses to read, by role.
        """
        part = self.parts[name].part_of(row)
        return part.source.preference(
            part.split, row - part.first, extra_responses, self.split_dialogues
        )

    def column(self, name: str, column: str, setting: str) -> dict[int, Any]:
        """The values of a column that all sources have, by row.

        Args:
            name: ``train``, ``validation`` or ``test``.
            column: the column.
            setting: which names it.

        Raises:
            InputError: a source has no such column.
        """
        self._asked.add(column)
        parts = self.parts[name]
        return parts.columns(self.of[name]["row"][:], [column] * len(parts), setting)

    def prompts(self, name: str) -> "Dataset":
        """A split's prompts without responses, each once, by the first row that has it."""
        # By their texts and cut by themselves: a row's tokens are cut to leave its longer response
        # room, by which one prompt would become several.
        found = [(row, self.prompt_tokens(one)) for row, one in self.different_prompts(name)]
        numbers, ids = zip(*found, strict=True)
        return prompts_alone(ids, numbers)

    def different_prompts(self, name: str) -> Iterator[tuple[int, Preference]]:
        """The rows of a split that have a prompt first: number and preference."""
        seen: set[str] = set()
        for row in self.of[name]["row"][:]:
            preference = self.preference(name, row)
            key = json.dumps([preference.prompt, asdict(preference.inputs)])
            if key not in seen:
                seen.add(key)
                yield row, preference

    def prompt_tokens(self, preference: Preference) -> list[int]:
        """Token ids of a prompt, cut where it is too long by itself."""
        ids = self.encoder.encode_prompt(preference.prompt, preference.inputs)
        whole = TokenizedPair(ids, [self.encoder.pad_id], [])
        return self.encoder.truncate(whole)[0].prompt

    def describe(self) -> dict[str, int | str]:
        """What a run should log about its data: pairs per split, flipped labels, what truncation
        touched, hash."""
        flipped, unread = self.flipped(), self.unread_columns()
        named = {one.name: one for one in self.sources}
        for name, sets in self.sets.items():
            named |= {f"{name}/{one.name}": one for one in sets}
        return {
            **({"columns/unread": ", ".join(unread)} if unread else {}),
            **({"template_time": self.clock} if self.clock else {}),
            **{
                f"left_out/{label}": part.rows for label, part in left_out(self.all_sources).items()
            },
            **{f"pairs/{name}": len(pairs) for name, pairs in self.of.items()},
            **self._contributions(),
            **({} if flipped is None else {"noise/flipped": int(flipped.sum())}),
            **{
                f"rows/{split if len(named) == 1 else name + '/' + split}/{outcome}": count
                for name, source in named.items()
                for split, one in source.loaded.items()
                for outcome, count in one.tokenized.counts.items()
            },
            "fingerprint": self.fingerprint,
        }

    def _contributions(self) -> dict[str, int | str]:
        """What each source gives, where there are several."""
        found: dict[str, int | str] = {}
        for name, parts in self.parts.items():
            if len(parts) > 1:
                counts = parts.counts(self.of[name]["row"][:])
                found |= {f"pairs/{name}/{source}": n for source, n in counts.items()}
        if "train" in self.of and (mixture := self.mixture()) is not None:
            found["mixture"] = mixture.describe()
        return found

    @property
    def clock(self) -> str | None:
        """The time that the chat template takes for the present, if it asks."""
        template = self.encoder.template
        return template.time.isoformat() if template.reads_clock else None

    def set_clock(self, time: str) -> None:
        """Have the chat template take a time for the present, and forget what it has written."""
        if time != self.template_time:
            for source in self.all_sources:
                source.loaded = {}
        self.template_time = time
        self.encoder.template.time = datetime.fromisoformat(time)

    def take_clock(self, time: str | None) -> None:
        """As :meth:`set_clock`, unless a setting says which time, or there is none to take."""
        if self.template_time is None and time is not None:
            self.set_clock(time)

    def stop_clock(self, data: str) -> None:
        """Let a template that asks for the time get the same one for the same data, whenever.

        Args:
            data: a hash of it.
        """
        from rotopo.data.token_cache import kept_time

        template = self.encoder.template
        if not template.reads_clock or self.template_time is not None:
            return
        template.time = kept_time(
            self.cache_dir, data + self.encoder.fingerprint(clock=False), template.time
        )
        self.template_time = template.time.isoformat()
        self.say(
            f"The chat template writes the time, which stays {self.template_time} for this data "
            "(data.template_time sets another)."
        )
