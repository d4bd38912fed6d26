"""Pairs: a source's rows as tokenised pairs, divided into splits and labelled for training."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rotopo.data.balance import balanced
from rotopo.data.batch import Role
from rotopo.data.noise import LabelNoise, TrainingPairs, with_flips
from rotopo.data.rows import pair_lengths
from rotopo.data.schemas import Format, Preference, read_row, resolve_format
from rotopo.data.settings import at_least, one_of
from rotopo.data.splits import Splits
from rotopo.data.tokenized import Outcome, TokenizedPair
from rotopo.data.tokens import OnBadRow, OnUnwritten, PairEncoder
from rotopo.errors import InputError
from rotopo.pretrained import load_tokenizer

if TYPE_CHECKING:  # else rotopo --help would wait for datasets, pandas and pyarrow
    from datasets import Dataset

    from rotopo.data.token_cache import LeftOut, TokenizedRows

# Responses that a column of the source may hold beside the pair, by the setting's name for them.
EXTRA_ROLES = {"gold": Role.GOLD, "reference_sample": Role.REFERENCE_SAMPLE}


class Loaded(NamedTuple):
    """One of a source's splits: its rows, their format, and what they are as tokens."""

    rows: "Dataset"
    format: Format
    tokenized: "TokenizedRows"


@dataclass(eq=False)
class Pairs:
    """The pairs of a run. Settings are those of :class:`rotopo.data.module.PairwiseDataModule`.

    Attributes:
        tokenizer_path: of the tokenizer.
        encoding: how its encoder writes, see :class:`rotopo.data.tokens.PairEncoder`.
        say, warn: what tells the user something, and what warns.
        loaded: by the source's split.
        of: pairs of ``train``, ``validation`` and ``test``, where there are any.
        labelled: the training pairs before noise and balance.
    """

    tokenizer_path: str
    encoding: dict[str, Any]
    splits: Splits
    format: str | None
    extra_responses: dict[str, str]
    margin: str | None
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
    loaded: dict[str, Loaded] = field(default_factory=dict)
    of: "dict[str, Dataset]" = field(default_factory=dict)
    labelled: "Dataset | None" = None

    def __post_init__(self) -> None:
        for name in ("train_pairs", "num_proc"):
            at_least(name, getattr(self, name), 1)
        one_of("on_bad_row", self.on_bad_row, OnBadRow)
        one_of("on_unwritten", self.on_unwritten, OnUnwritten)
        for role in self.extra_responses:
            if role not in EXTRA_ROLES:
                raise InputError(
                    f"data.extra_responses: {role!r} is none of {', '.join(EXTRA_ROLES)}."
                )
        self._split_of: dict[str, str] = {}  # of train, validation and test the source's
        self._asked: set[str] = set()  # columns of the source that were asked for by name

    @property
    def source(self) -> str:
        """Where the rows come from."""
        return self.splits.source

    @cached_property
    def encoder(self) -> PairEncoder:
        """How preferences become tokens; its ``tokenizer`` is the one to save with a model."""
        settings = self.encoding | {"template_time": self.template_time}
        return PairEncoder(load_tokenizer(self.tokenizer_path), **settings)

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
        for split in self.splits.named:
            if split not in self.loaded:
                self.loaded[split] = self._load(split)

    def _load(self, split: str) -> Loaded:
        from rotopo.data.sources import load_rows
        from rotopo.data.token_cache import fingerprint_rows, tokenize_rows

        rows = load_rows(self.source, split)
        if self.encoder.template.reads_clock:
            self.stop_clock(fingerprint_rows(rows))
        try:
            row_format = resolve_format(self.format, rows)
            tokenized = tokenize_rows(
                rows,
                row_format,
                self.encoder,
                self.cache_dir,
                self.num_proc,
                self.on_bad_row,
                self.extra_responses,
                self.on_unwritten,
                self.split_dialogues,
            )
        except InputError as error:
            raise InputError(f"{self.source} [{split}]: {error}") from error
        return Loaded(rows, row_format, tokenized)

    def divide(self) -> None:
        """Divide the rows into ``of``, and label the training pairs.

        Raises:
            InputError: a split has no pair left, or two share a group.
        """
        self.load()
        for split in self.splits.named:
            self.say(f"{self.source} [{split}]: {self.loaded[split].tokenized.summary()}.")
        chosen = self.splits.choose({split: self.loaded[split].rows for split in self.loaded})
        for name, (split, numbers) in chosen.items():
            self._split_of[name] = split
            pairs = self.loaded[split].tokenized.pairs
            kept = np.flatnonzero(np.isin(pairs.with_format("numpy")["row"][:], numbers))
            if len(kept) == 0:
                raise InputError(f"No {name} pair is left: every one of them was dropped.")
            self.of[name] = pairs.select(kept)
        if "train" in self.of:
            self._label()
        if unread := self.unread_columns():
            self.say(f"{self.source}: columns that nothing reads: {', '.join(unread)}.")

    def _label(self) -> None:
        """Choose, flip and balance the training pairs, as far as settings say so."""
        if self.train_pairs is not None:
            train = self.of["train"]
            order = self.splits.permutation(len(train))[: self.train_pairs]
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
            drawn = balanced(*pair_lengths(train), self.splits.seed)
            self.of["train"] = train.select(drawn)
            self.say(f"data.balance_lengths: {len(drawn)} pairs drawn from {len(train)}.")

    def unread_columns(self) -> list[str]:
        """Columns of the source that have no meaning to the run, each once."""
        asked = {
            *(self.splits.group_by, self.margin, self.accuracy_by),
            *self.extra_responses.values(),
            *self._asked,
        }
        unread = (one.format.unread(one.rows.column_names) for one in self.loaded.values())
        return list(dict.fromkeys(c for columns in unread for c in columns if c not in asked))

    def left_out(self) -> dict[str, "LeftOut"]:
        """What of the source's rows the chat template does not write, by what it is; of several
        splits the rows together."""
        found: dict[str, LeftOut] = {}
        for one in self.loaded.values():
            for label, part in one.tokenized.left_out.items():
                before = found.get(label)
                rows = part.rows + (before.rows if before else 0)
                found[label] = replace(before or part, rows=rows)
        return found

    def refuse_unwritten(self) -> None:
        """Say what the chat template leaves out of rows, and refuse what matters.

        Raises:
            InputError: there is such a thing, and ``data.on_unwritten`` is ``error``.
        """
        left_out = self.left_out()
        if self.on_unwritten == "error":
            for part in (part for part in left_out.values() if part.refused):
                raise InputError(
                    f"{self.source}: {part.first} ({part.rows} rows). Give a template that does "
                    "(data.chat_template), change the rows, or set data.on_unwritten to 'warn'."
                )
        for label, part in left_out.items():
            say = self.warn if part.refused else self.say
            say(f"{self.source}: not written by the chat template: {label}, in {part.rows} rows.")

    def outcomes(self) -> dict[str, int]:
        """How many of the source's rows came to which outcome."""
        found = Counter[str]()
        for one in self.loaded.values():
            found.update(one.tokenized.counts)
        return {outcome.name.lower(): found[outcome.name.lower()] for outcome in Outcome}

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
            row: its number in that split's source.
            extra_responses: columns of further responses to read, by role.
        """
        from rotopo.data.token_cache import without_filling

        one = self.loaded[self._split_of[name]]
        values = without_filling(one.rows[row], one.rows.features)
        return read_row(one.format, values, extra_responses, self.split_dialogues)

    def column(self, name: str, column: str, setting: str) -> dict[int, Any]:
        """The values of a column of the source, by row.

        Args:
            name: ``train``, ``validation`` or ``test``.
            column: the column.
            setting: which names it.

        Raises:
            InputError: the source has no such column.
        """
        self._asked.add(column)
        rows = self.loaded[self._split_of[name]].rows
        if column not in rows.column_names:
            raise InputError(
                f"{setting}: {self.source} has no column {column!r}, only "
                f"{', '.join(rows.column_names)}."
            )
        numbers = self.of[name]["row"][:]
        return dict(zip(numbers, rows.select(numbers)[column][:], strict=True))

    def prompts(self, name: str) -> "Dataset":
        """A split's prompts without responses, each once, by the first row that has it."""
        # By their texts and cut by themselves: a row's tokens are cut to leave its longer response
        # room, by which one prompt would become several.
        from datasets import Dataset

        prompts: dict[str, tuple[int, list[int]]] = {}
        for row in self.of[name]["row"][:]:
            preference = self.preference(name, row)
            key = json.dumps([preference.prompt, asdict(preference.inputs)])
            if key not in prompts:
                prompt = self.encoder.encode_prompt(preference.prompt, preference.inputs)
                whole = TokenizedPair(prompt, [self.encoder.pad_id], [])
                prompts[key] = row, self.encoder.truncate(whole)[0].prompt
        numbers, ids = zip(*prompts.values(), strict=True)
        none: list[list[int]] = [[]] * len(ids)
        columns = {"prompt": ids, "chosen": none, "rejected": none, "row": numbers}
        return Dataset.from_dict(columns)

    def describe(self) -> dict[str, int | str]:
        """What a run should log about its data: pairs per split, flipped labels, what truncation
        touched, hash."""
        flipped, unread = self.flipped(), self.unread_columns()
        return {
            **({"columns/unread": ", ".join(unread)} if unread else {}),
            **({"template_time": self.clock} if self.clock else {}),
            **{f"left_out/{label}": part.rows for label, part in self.left_out().items()},
            **{f"pairs/{name}": len(pairs) for name, pairs in self.of.items()},
            **({} if flipped is None else {"noise/flipped": int(flipped.sum())}),
            **{
                f"rows/{split}/{outcome}": count
                for split, one in self.loaded.items()
                for outcome, count in one.tokenized.counts.items()
            },
            "fingerprint": self.fingerprint,
        }

    @property
    def clock(self) -> str | None:
        """The time that the chat template takes for the present, if it asks."""
        template = self.encoder.template
        return template.time.isoformat() if template.reads_clock else None

    def set_clock(self, time: str) -> None:
        """Have the chat template take a time for the present, and forget what it has written."""
        if time != self.template_time:
            self.loaded = {}
        self.template_time = time
        self.encoder.template.time = datetime.fromisoformat(time)

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
