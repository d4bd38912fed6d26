"""PairwiseDataModule: preference data from its source to batches."""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Subset

from rotopo.data.balance import balanced
from rotopo.data.batch import (
    Layout,
    PairBatch,
    PromptBatch,
    Role,
    TokenizedRow,
    collate,
    collate_prompts,
    response_key,
)
from rotopo.data.doctor.diagnosis import diagnose, refusal, render
from rotopo.data.doctor.examination import Finding, Patient
from rotopo.data.noise import LabelNoise, TrainingPairs, with_flips
from rotopo.data.responses import Responses
from rotopo.data.rows import Rows, pair_lengths, refuse_beyond, unpaired_rows
from rotopo.data.sampler import EvalSampler, PairLength, StatefulLoader, StepSampler
from rotopo.data.schemas import Format, Preference, read_row, resolve_format
from rotopo.data.tokenized import Outcome, TokenizedPair, Truncation
from rotopo.data.tokens import OnBadRow, OnUnwritten, PairEncoder
from rotopo.data.values import number
from rotopo.errors import InputError
from rotopo.files import sha256, to_json, write_whole
from rotopo.pretrained import Positions, load_tokenizer, positions, vocabulary_size
from rotopo.pretrained import cache_dir as default_cache_dir

if TYPE_CHECKING:  # else rotopo --help would wait for datasets, pandas and pyarrow
    from datasets import Dataset

    from rotopo.data.token_cache import LeftOut, TokenizedRows

_EXTRA_ROLES = {"gold": Role.GOLD, "reference_sample": Role.REFERENCE_SAMPLE}


class Selector(Protocol):
    """Who decides before every epoch what to train on."""

    def training_rows(self, trainer: Any, rows: Rows) -> Rows:
        """Of all training rows those of the epoch that begins, or these with others."""

    def settings(self) -> str:
        """All that the decision follows from beside the run's own settings, as one line."""


class PairwiseDataModule(LightningDataModule):
    """Preference pairs: loaded, tokenised once, split, and batched.

    The held-out rows are chosen by the seed among the rows as stored, before any is dropped, so
    no other setting moves a row from one split to another.

    Args:
        tokenizer: the model's name, folder or GGUF file, or ``package:PACKAGE/FILE``; normally
            the same as ``policy.path``.
        source: a data set on the Hub (``name`` or ``name:config``), a json, jsonl, csv, parquet
            or arrow file, a glob or folder of them, ``package:PACKAGE/FILE``, or
            ``python:package.module.function`` (``:ARGUMENT`` behind it, if it takes one).
        format: the rows' format by name (explicit, implicit, ultrafeedback, hh, align_anything,
            sharegpt, kto), or the dotted path of a function row -> Preference; None detects it.
        train_split: the source's split to train on.
        validation: the fraction of the training split to hold out for validation, or the name of
            another split; 0 for none.
        test: the same for the test. With 1 the whole training split is tested (or validated), and
            nothing can be trained on it.
        group_by: a column whose values are never divided between splits; None if rows are
            independent.
        extra_responses: columns with further responses to a row's prompt, by what they are:
            ``gold`` (TPO) and ``reference_sample`` (TYPO).
        margin: a column with a number for each pair, which the chosen's reward has to be above
            the rejected's by; for reward models. None is 0.
        train_pairs: train on this many pairs only, drawn by the seed; None for all.
        balance_lengths: draw the training pairs again so that those with the longer chosen
            response and those with the longer rejected one count equally, see
            :func:`rotopo.data.balance.balanced`.
        noise: flips labels of the training pairs, before they are balanced, by the class path of a
            :class:`rotopo.data.noise.LabelNoise`: SymmetricFlips, LengthFlips, MarginFlips,
            AssumedPreference, or your own. Validation and test stay clean, and a flipped pair
            keeps its ``margin``. None flips none.
        accuracy_by: a column by whose values the test also gives the accuracy; None for none.
        pairs_per_step: pairs of one optimiser step, over all micro-batches and ranks.
        score: a jsonl file of responses, see :class:`rotopo.data.responses.Responses`, which
            ``predict`` scores; None has it generate a response to each held-out prompt instead.
        eval_pairs_per_batch: pairs of a validation, test or prediction batch at most.
        token_budget: tokens of a micro-batch at most, padding included; None for no limit.
        layout: ``packed`` computes a prompt once for both responses, and no padding;
            ``shared_prompt`` a prompt once, on a line for each row, which costs less under a dense
            attention mask (``policy.attention`` sdpa or eager); ``padded`` a prompt twice.
        length_window: make the pairs of a step similar in length: those of so many steps are
            sorted before they are cut into steps. 1 leaves a step's pairs to chance, as papers do.
        chat_template: Jinja text, a file that holds it, or the name of one of the tokenizer's,
            where it has several; None takes the tokenizer's.
        chat_template_kwargs: arguments of the chat template, ``{enable_thinking: false}`` say, the
            same wherever it is used; an export has them as the template's defaults. A column
            ``chat_template_kwargs`` of the rows has the last word.
        template_time: what a chat template takes for the present that asks for it, as
            2026-01-31T12:00:00; None takes the checkpoint's or, of data that was tokenised before,
            the time of then, else the present.
        split_dialogues: take a prompt's turn that holds a whole dialogue, marked Human: and
            Assistant: or the like, apart into its turns.
        system_message: put before prompts that have no system turn of their own.
        pad_token: the token of the vocabulary to pad with; None takes the tokenizer's.
        max_length: tokens of a prompt and its longer response at most.
        truncation: what happens to longer rows: ``prompt_left`` cuts the prompt on its left,
            ``response_right`` the responses on their right, ``drop`` drops the row.
        on_bad_row: whether a row that cannot be used is an error, or dropped and counted.
        on_unwritten: whether it is an error, of which a warning is said otherwise, if the chat
            template leaves out something of rows that matters: a turn's content, calls, tools, any
            field of a response's messages. With ``on_bad_row: drop`` such rows are dropped.
        num_workers: processes that make batches beside the step, each two ahead, and stay for the
            next epoch; None takes 2 on a GPU, and none on a CPU, whose cores the step needs. On a
            GPU batches come in pinned memory, and their copying does not wait either.
        num_proc: processes that tokenise; None takes one per 10,000 rows, up to the
            processors.
        seed: seed of the held-out rows and of the order of training.
        cache_dir: folder for the tokenised data; None takes $ROTOPO_CACHE or ~/.cache/rotopo.
        doctor: have every fit begin with the checks of ``rotopo doctor``, of which errors stop it;
            see :mod:`rotopo.data.doctor.diagnosis`. False is for data that is wrong on purpose.
    """

    def __init__(
        self,
        tokenizer: str,
        source: str,
        format: str | None = None,
        train_split: str = "train",
        validation: float | str = 0.05,
        test: float | str = 0.0,
        group_by: str | None = None,
        extra_responses: dict[str, str] | None = None,
        margin: str | None = None,
        train_pairs: int | None = None,
        balance_lengths: bool = False,
        noise: LabelNoise | None = None,
        accuracy_by: str | None = None,
        pairs_per_step: int = 32,
        score: str | None = None,
        eval_pairs_per_batch: int = 16,
        token_budget: int | None = None,
        layout: Layout = "packed",
        length_window: int = 1,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        template_time: str | None = None,
        split_dialogues: bool = False,
        system_message: str | None = None,
        pad_token: str | None = None,
        max_length: int = 1024,
        truncation: Truncation = "prompt_left",
        on_bad_row: OnBadRow = "error",
        on_unwritten: OnUnwritten = "error",
        num_workers: int | None = None,
        num_proc: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        doctor: bool = True,
    ) -> None:
        super().__init__()
        for name, count in (
            ("train_pairs", train_pairs),
            ("pairs_per_step", pairs_per_step),
            ("eval_pairs_per_batch", eval_pairs_per_batch),
            ("token_budget", token_budget),
            ("length_window", length_window),
            ("num_proc", num_proc),
        ):
            if count is not None and count < 1:
                raise InputError(f"data.{name} is {count}: it has to be at least 1.")
        for name, value, known in (
            ("layout", layout, get_args(Layout)),
            ("on_bad_row", on_bad_row, get_args(OnBadRow)),
            ("on_unwritten", on_unwritten, get_args(OnUnwritten)),
        ):
            if value not in known:
                raise InputError(f"data.{name} is {value!r}: it has to be {' or '.join(known)}.")
        if num_workers is not None and num_workers < 0:
            raise InputError(f"data.num_workers is {num_workers}: it has to be at least 0.")
        if not 0 <= seed < 2**32:
            raise InputError(f"data.seed is {seed}: it has to be from 0 to 2**32 - 1.")
        fractions = {"validation": validation, "test": test}
        for name, fraction in fractions.items():
            if not isinstance(fraction, str) and not 0 <= fraction <= 1:
                raise InputError(
                    f"data.{name} is {fraction}: give a fraction in [0, 1] or a split's name."
                )
        shares = sorted(f for f in fractions.values() if not isinstance(f, str))
        if sum(shares) >= 1 and shares not in ([0, 1], [1]):
            raise InputError("data.validation and data.test leave no pair to train on.")
        named = [train_split, *(name for name in fractions.values() if isinstance(name, str))]
        if len({name.partition("[")[0] for name in named}) < len(named):
            raise InputError(
                f"data.train_split, data.validation and data.test name the splits "
                f"{', '.join(named)}: each has to be another one; to hold out a part of a split, "
                "give a fraction."
            )
        for role in extra_responses or {}:
            if role not in _EXTRA_ROLES:
                raise InputError(
                    f"data.extra_responses: {role!r} is none of {', '.join(_EXTRA_ROLES)}."
                )
        self.tokenizer_path = tokenizer
        self.source = source
        self.format = format
        self.train_split = train_split
        self.held_out = fractions
        self.group_by = group_by
        self.extra_responses = extra_responses or {}
        self.margin = margin
        self.train_pairs = train_pairs
        self.balance_lengths = balance_lengths
        self.noise = noise
        self.accuracy_by = accuracy_by
        self.pairs_per_step = pairs_per_step
        self.score = score
        self.eval_pairs_per_batch = eval_pairs_per_batch
        self.token_budget = token_budget
        self.layout = layout
        self.length_window = length_window
        self.on_bad_row = on_bad_row
        self.on_unwritten = on_unwritten
        self.split_dialogues = split_dialogues
        self.template_time = template_time
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.seed = seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.doctor = doctor
        self._encoding: dict[str, Any] = {
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
            "system_message": system_message,
            "pad_token": pad_token,
            "max_length": max_length,
            "truncation": truncation,
        }
        self._loaded: dict[str, tuple[Dataset, Format, TokenizedRows]] = {}
        # By split of the source: its rows and their format; and for train, ... the split.
        self._sources: dict[str, tuple[Dataset, Format]] = {}
        self._split_of: dict[str, str] = {}
        self._pairs: dict[str, Dataset] = {}
        self._labelled: Dataset | None = None  # training pairs before noise and balance
        self._tokenized: dict[str, TokenizedRows] = {}
        self._rows_of: dict[tuple[str, Any], Rows] = {}
        # Columns of the source that have been asked for by their names.
        self._asked: set[str] = set()
        # Who decides before every epoch what to train on, if anybody does.
        self.selector: Selector | None = None

    @cached_property
    def encoder(self) -> PairEncoder:
        """How preferences become tokens; its ``tokenizer`` is the one to save with a model."""
        settings = self._encoding | {"template_time": self.template_time}
        return PairEncoder(load_tokenizer(self.tokenizer_path), **settings)

    @property
    def pad_id(self) -> int:
        """Id of the token that fills up batches."""
        return self.encoder.pad_id

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end a generation."""
        return self.encoder.stop_ids

    @cached_property
    def data_fingerprint(self) -> str:
        """Hash of the tokenised training pairs; of the others where there are none."""
        from rotopo.data.token_cache import fingerprint_rows

        return fingerprint_rows(self._pairs.get("train") or next(iter(self._pairs.values())))[:16]

    @cached_property
    def _positions(self) -> Positions | None:
        return positions(self.tokenizer_path)

    @cached_property
    def responses(self) -> Responses:
        """What ``predict`` scores."""
        assert self.score is not None
        if self.encoder.template.reads_clock and Path(self.score).is_file():
            self._stop_clock(sha256(Path(self.score)))
        strict = self.on_unwritten == "error"
        return Responses(self.score, self.encoder, strict, self.split_dialogues)

    def prepare_data(self) -> None:
        if not self._pairs and not self._only_scores():
            self._loaded = {split: self._load(split) for split in self._source_splits()}

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self.selector = None  # that of another run; this one's callbacks come next
        if not self._pairs and not self._only_scores():
            self._set_up()
            if stage != "doctor":  # which finds it among other things
                self._refuse_unwritten()
        if stage == "fit" and self.doctor:
            self._see_the_doctor()

    def _set_up(self) -> None:
        self._agree_on_clock()
        rows: dict[str, Dataset] = {}
        for split in self._source_splits():
            # Where another rank has prepared it, loading is a look at the cache.
            loaded = self._loaded.pop(split, None) or self._load(split)
            rows[split], row_format, self._tokenized[split] = loaded
            self._sources[split] = rows[split], row_format
            rank_zero_info(f"{self.source} [{split}]: {self._tokenized[split].summary()}.")
        chosen = self._choose(rows)
        self._check_groups(rows, chosen)
        for name, (split, numbers) in chosen.items():
            self._split_of[name] = split
            pairs = self._tokenized[split].pairs
            kept = np.flatnonzero(np.isin(pairs.with_format("numpy")["row"][:], numbers))
            if len(kept) == 0:
                raise InputError(f"No {name} pair is left: every one of them was dropped.")
            self._pairs[name] = pairs.select(kept)
        if self.train_pairs is not None and "train" in self._pairs:
            train = self._pairs["train"]
            order = self._permutation(len(train))[: self.train_pairs]
            self._pairs["train"] = train.select(np.sort(order))
        self._labelled = self._pairs.get("train")
        if self.noise is not None and "train" in self._pairs:
            train = self._pairs["train"]
            numbers = np.asarray(train.with_format("numpy")["row"][:])
            columns = partial(self.column, "train", setting="data.noise")
            flipped = self.noise.flips(TrainingPairs(numbers, *pair_lengths(train), columns))
            self._pairs["train"] = with_flips(train, flipped)
            rank_zero_info(
                f"data.noise: {type(self.noise).__name__} flipped {flipped.sum()} of "
                f"{len(flipped)} labels ({100 * flipped.mean():.1f} %)."
            )
        if self.balance_lengths and "train" in self._pairs:
            train = self._pairs["train"]
            drawn = balanced(*pair_lengths(train), self.seed)
            self._pairs["train"] = train.select(drawn)
            rank_zero_info(f"data.balance_lengths: {len(drawn)} pairs drawn from {len(train)}.")
        if unread := self.unread_columns():
            rank_zero_info(f"{self.source}: columns that nothing reads: {', '.join(unread)}.")

    def unread_columns(self) -> list[str]:
        """Columns of the source that have no meaning to the run, each once."""
        asked = {
            *(self.group_by, self.margin, self.accuracy_by),
            *self.extra_responses.values(),
            *self._asked,
        }
        unread = (f.unread(rows.column_names) for rows, f in self._sources.values())
        return list(dict.fromkeys(c for columns in unread for c in columns if c not in asked))

    def left_out(self) -> dict[str, "LeftOut"]:
        """What of the source's rows the chat template does not write, by what it is; of several
        splits the rows together."""
        found: dict[str, LeftOut] = {}
        for tokenized in self._tokenized.values():
            for label, part in tokenized.left_out.items():
                before = found.get(label)
                rows = part.rows + (before.rows if before else 0)
                found[label] = replace(before or part, rows=rows)
        return found

    def _refuse_unwritten(self) -> None:
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
            say = rank_zero_warn if part.refused else rank_zero_info
            say(f"{self.source}: not written by the chat template: {label}, in {part.rows} rows.")

    def findings(self, module: Any = None) -> list[Finding]:
        """What the data doctor finds, once the data is set up.

        Args:
            module: what is to be trained on it; None takes the Trainer's.

        Raises:
            InputError: there is no pair to train on.
        """
        if self._labelled is None:
            raise _nothing_to_train_on()
        if module is None and self.trainer is not None:
            module = self.trainer.lightning_module
        needs = getattr(module, "needs", None)
        outcomes = Counter[str]()
        for tokenized in self._tokenized.values():
            outcomes.update(tokenized.counts)
        return diagnose(
            Patient(
                self.encoder,
                {**self._pairs, "train": self._labelled},
                self._pairs["train"],
                lambda split, row: self.preference(split, row, self.extra_responses),
                {outcome.name.lower(): outcomes[outcome.name.lower()] for outcome in Outcome},
                vocabulary_size(self.tokenizer_path),
                self.group_by,
                self._positions,
                needs is not None and needs.ends,
                self.left_out(),
                self.on_unwritten == "warn",
                self.unread_columns(),
            )
        )

    def _see_the_doctor(self) -> None:
        """Check the data on rank zero, and stop on every rank or on none."""
        assert self.trainer is not None
        found: list[Finding] | InputError | None = None
        if self.trainer.is_global_zero:
            try:
                found = self.findings()
            except InputError as error:
                found = error
        found = self.trainer.strategy.broadcast(found)
        if isinstance(found, InputError):
            raise found
        assert found is not None
        folder = self.trainer.log_dir  # asked on every rank
        if self.trainer.is_global_zero and self.trainer.logger is not None and folder is not None:
            write_whole(Path(folder) / "doctor.json", to_json([asdict(f) for f in found]))
        rank_zero_info(render(found, complete=False))
        refused = refusal(found)
        if refused is not None:
            raise InputError(refused)

    def train_dataloader(self) -> StatefulLoader:
        if "train" not in self._pairs:
            raise _nothing_to_train_on()
        accumulation = self._accumulation()
        world_size, rank = self._ranks()
        rows = self.rows("train")
        if self.selector is not None:
            rows = self.selector.training_rows(self.trainer, rows)
        sampler = StepSampler(
            rows.lengths(),
            self.pairs_per_step,
            accumulation,
            world_size,
            rank,
            self.seed,
            self.token_budget,
            self.layout,
            self.length_window,
        )
        scale = accumulation * world_size / self.pairs_per_step
        return StatefulLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=partial(collate, pad_id=self.pad_id, layout=self.layout, loss_scale=scale),
            **self._beside_the_step(),
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if "validation" in self._pairs:
            return self._eval_loader("validation")
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        raise InputError("data.validation is 0: there is nothing to validate on.")

    def test_dataloader(self) -> DataLoader:
        if "test" not in self._pairs:
            raise InputError("data.test is 0: there is nothing to test on.")
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """What ``predict`` works on: prompts to respond to, or the responses of ``data.score``.

        The prompts are those of the test split, or of the validation split where there is no
        test, each once, by the first row that has it. Batches hold prompts of similar lengths, the
        longest first.
        """
        rows = self._predict_rows
        collate_fn: Any = partial(_collate_prompts, pad_id=self.pad_id)
        if self.score is not None:
            collate_fn = partial(_collate_mean, pad_id=self.pad_id, layout=self.layout)
        world_size, rank = self._ranks()
        if len(rows) < world_size:
            raise InputError(
                f"{len(rows)} rows to predict on {world_size} ranks: lower trainer.devices."
            )
        sizes = [
            prompt + (sum(responses) if self.score is not None else 0)
            for prompt, responses in rows.lengths()
        ]
        order = sorted(range(len(rows)), key=lambda i: sizes[i], reverse=True)
        mine = order[rank::world_size]
        # As many on every rank, since none may wait for another: the shortest comes once more.
        mine += mine[-1:] * (-(-len(order) // world_size) - len(mine))
        # By batch size, since Lightning rebuilds the batch sampler of a prediction.
        return DataLoader(
            Subset(rows, mine),
            batch_size=self.eval_pairs_per_batch,
            collate_fn=collate_fn,
            **self._beside_the_step(),
        )

    @cached_property
    def _predict_rows(self) -> Rows:
        if self.score is not None:
            rows = Rows(self.responses.tokens, behind=self._behind())
            refuse_beyond(rows, self._positions, f"data.score: {self.score}")
            return rows
        # By their texts and cut by themselves: a row's tokens are cut to leave its longer response
        # room, by which one prompt would become several.
        from datasets import Dataset

        split = self._prompt_split()
        prompts: dict[str, tuple[int, list[int]]] = {}
        for row in self._pairs[split]["row"][:]:
            preference = self.preference(split, row)
            key = json.dumps([preference.prompt, asdict(preference.inputs)])
            if key not in prompts:
                prompt = self.encoder.encode_prompt(preference.prompt, preference.inputs)
                whole = TokenizedPair(prompt, [self.pad_id], [])
                prompts[key] = row, self.encoder.truncate(whole)[0].prompt
        numbers, ids = zip(*prompts.values(), strict=True)
        none: list[list[int]] = [[]] * len(ids)
        columns = {"prompt": ids, "chosen": none, "rejected": none, "row": numbers}
        return Rows(Dataset.from_dict(columns))

    def prediction_fingerprint(self) -> str:
        """Hash of what :meth:`predict_dataloader` gives: rows and their division into batches."""
        from rotopo.data.token_cache import fingerprint_rows

        # The lines of a file say more than their tokens, and come out again.
        lines = self.responses.lines if self.score is not None else []
        rows, encoder = fingerprint_rows(self._predict_rows.pairs), self.encoder.fingerprint()
        settings = [rows, encoder, lines, self.eval_pairs_per_batch, self.layout]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def prediction_line(self, row: int) -> dict[str, Any]:
        """What a line of predictions says beside the prediction itself.

        Args:
            row: as the batches of :meth:`predict_dataloader` number it.
        """
        if self.score is not None:
            return self.responses.lines[row]
        preference = self.preference(self._prompt_split(), row)
        return {"row": row, "prompt": preference.prompt, **preference.inputs.columns}

    def has(self, name: str) -> bool:
        """Whether there are rows of ``train``, ``validation`` or ``test``."""
        return name in self._pairs

    def probe(self, pairs: int) -> PairBatch:
        """The first validation pairs (training pairs where there are none), as one batch that is
        the same on every rank and at any time."""
        rows = self.rows("validation" if "validation" in self._pairs else "train")
        return collate([rows[i] for i in range(min(pairs, len(rows)))], self.pad_id, self.layout, 1)

    def flipped(self) -> np.ndarray | None:
        """Which training pairs ``data.noise`` has flipped the labels of, in the order in which they
        are stored [N]; None without noise, or without training pairs. Batches do not say."""
        if self.noise is None or "train" not in self._pairs:
            return None
        return np.asarray(self._pairs["train"].with_format("numpy")["flipped"][:])

    def preference(
        self, name: str, row: int, extra_responses: Mapping[str, str] | None = None
    ) -> Preference:
        """A row as messages, labelled as in the source, whatever ``data.noise`` flips.

        Args:
            name: ``train``, ``validation`` or ``test``.
            row: its number in that split's source.
            extra_responses: columns of further responses to read, by role.
        """
        from rotopo.data.token_cache import without_filling

        rows, row_format = self._sources[self._split_of[name]]
        values = without_filling(rows[row], rows.features)
        return read_row(row_format, values, extra_responses, self.split_dialogues)

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
        rows, _ = self._sources[self._split_of[name]]
        if column not in rows.column_names:
            raise InputError(
                f"{setting}: {self.source} has no column {column!r}, only "
                f"{', '.join(rows.column_names)}."
            )
        numbers = self._pairs[name]["row"][:]
        return dict(zip(numbers, rows.select(numbers)[column][:], strict=True))

    def describe(self) -> dict[str, int | str]:
        """What a run should log about its data: pairs per split, flipped labels, what truncation
        touched, hash."""
        flipped, unread = self.flipped(), self.unread_columns()
        return {
            **({"columns/unread": ", ".join(unread)} if unread else {}),
            **({"template_time": self._clock} if self._clock else {}),
            **{f"left_out/{label}": part.rows for label, part in self.left_out().items()},
            **{f"pairs/{name}": len(pairs) for name, pairs in self._pairs.items()},
            **({} if flipped is None else {"noise/flipped": int(flipped.sum())}),
            **{
                f"rows/{split}/{outcome}": count
                for split, tokenized in self._tokenized.items()
                for outcome, count in tokenized.counts.items()
            },
            "fingerprint": self.data_fingerprint,
        }

    def state_dict(self) -> dict[str, str | int | None]:
        """What a position in the epoch means nothing without."""
        return {
            "data_fingerprint": self.data_fingerprint,
            "seed": self.seed,
            "pairs_per_step": self.pairs_per_step,
            "length_window": self.length_window,
            "margin": self.margin,
            "template_time": self._clock,
            "selection": self.selector.settings() if self.selector is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, str | int | None]) -> None:
        """Refuse to go on training where the position in the epoch would mean something else.

        Raises:
            InputError: the checkpoint's training pairs or their order are not these.
        """
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        here = self.state_dict()
        before, now = state_dict.get("template_time"), here["template_time"]
        if before != now:
            raise InputError(
                f"data.template_time: the chat template writes the time, which was {before} for "
                f"this checkpoint and is {now} here: leave the setting out."
            )
        if state_dict["data_fingerprint"] != here["data_fingerprint"]:
            raise InputError(
                "ckpt_path: this checkpoint was trained on other pairs (fingerprint "
                f"{state_dict['data_fingerprint']}, here {here['data_fingerprint']}): check "
                "data.source, data.seed, data.noise and the settings of the tokens."
            )
        for name, value in here.items():
            before = state_dict.get(name)
            if before != value:
                raise InputError(
                    f"ckpt_path: this checkpoint was trained with {name} {before}, here "
                    f"{value}: its position in the epoch does not fit. Resume with the same."
                )

    @property
    def _clock(self) -> str | None:
        """The time that the chat template takes for the present, if it asks."""
        template = self.encoder.template
        return template.time.isoformat() if template.reads_clock else None

    def take_clock(self, checkpoint: Mapping[str, Any]) -> None:
        """Have the chat template take a checkpoint's time for the present, unless a setting says
        which."""
        time = (checkpoint.get(type(self).__qualname__) or {}).get("template_time")
        if self.template_time is None and time is not None:
            self._set_clock(time)

    def _stop_clock(self, data: str) -> None:
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
        rank_zero_info(
            f"The chat template writes the time, which stays {self.template_time} for this data "
            "(data.template_time sets another)."
        )

    def _agree_on_clock(self) -> None:
        """Take the first rank's time."""
        if self.trainer is None or not self.encoder.template.reads_clock:
            return
        time = self.trainer.strategy.broadcast(self.template_time)
        if time not in (None, self.template_time):
            self._loaded = {}
            self._set_clock(time)

    def _set_clock(self, time: str) -> None:
        self.template_time = time
        self.encoder.template.time = datetime.fromisoformat(time)

    def _source_splits(self) -> list[str]:
        return [self.train_split, *(s for s in self.held_out.values() if isinstance(s, str))]

    def _only_scores(self) -> bool:
        """Whether the run has no use for the source."""
        predicting = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        return predicting and self.score is not None

    def _prompt_split(self) -> str:
        for name in ("test", "validation"):
            if name in self._pairs:
                return name
        raise InputError("data.test and data.validation are 0: there is no prompt to respond to.")

    def _load(self, split: str) -> "tuple[Dataset, Format, TokenizedRows]":
        from rotopo.data.sources import load_rows
        from rotopo.data.token_cache import fingerprint_rows, tokenize_rows

        rows = load_rows(self.source, split)
        if self.encoder.template.reads_clock:
            self._stop_clock(fingerprint_rows(rows))
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
        return rows, row_format, tokenized

    def _choose(self, rows: "dict[str, Dataset]") -> dict[str, tuple[str, np.ndarray]]:
        """For train, validation and test: the source's split, and the rows of it."""
        pool = rows[self.train_split]
        labels = np.arange(len(pool)) if self.group_by is None else self._groups(pool)
        groups, group_of_row = np.unique(labels, return_inverse=True)
        order = self._permutation(len(groups))
        # Test groups come from one end and validation groups from the other, so that the size of
        # one does not change the other.
        ends = {"test": order, "validation": order[::-1]}
        sizes = np.bincount(group_of_row)
        rest = np.ones(len(pool), dtype=bool)
        chosen: dict[str, tuple[str, np.ndarray]] = {}
        if 1 in self.held_out.values():
            name = next(name for name, share in self.held_out.items() if share == 1)
            return {name: (self.train_split, np.arange(len(pool)))}
        for name, share in self.held_out.items():
            if isinstance(share, str):
                chosen[name] = share, np.arange(len(rows[share]))
            elif share > 0:
                wanted = max(1, round(share * len(pool)))
                n_groups = int(np.searchsorted(sizes[ends[name]].cumsum(), wanted)) + 1
                held_out = np.isin(group_of_row, ends[name][:n_groups])
                if not (rest & held_out).sum() == held_out.sum() < rest.sum():
                    raise InputError(
                        f"data.validation and data.test leave no pair to train on: {len(pool)} "
                        f"rows in {len(groups)} groups are too few for such fractions."
                    )
                rest &= ~held_out
                chosen[name] = self.train_split, np.flatnonzero(held_out)
        return {"train": (self.train_split, np.flatnonzero(rest)), **chosen}

    def _groups(self, rows: "Dataset") -> np.ndarray:
        if self.group_by not in rows.column_names:
            raise InputError(
                f"data.group_by: {self.source} has no column {self.group_by!r}, only "
                f"{', '.join(rows.column_names)}."
            )
        return np.array([repr(value) for value in rows[self.group_by][:]])

    def _check_groups(
        self, rows: "dict[str, Dataset]", chosen: dict[str, tuple[str, np.ndarray]]
    ) -> None:
        """Splits that the source names may share groups, which no choice of ours can mend."""
        if self.group_by is None:
            return
        owner: dict[str, str] = {}
        for name, (split, numbers) in chosen.items():
            for group in np.unique(self._groups(rows[split])[numbers]).tolist():
                if owner.setdefault(group, name) != name:
                    raise InputError(
                        f"data.group_by: the {self.group_by} {group} is in {owner[group]} and in "
                        f"{name}: hold out fractions instead of the source's splits."
                    )

    def _permutation(self, n: int) -> np.ndarray:
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).numpy()

    def _accumulation(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _beside_the_step(self) -> dict[str, Any]:
        """What all loaders share: batches are made and copied while the device computes."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        default = 2 if on_gpu else 0
        workers = default if self.num_workers is None else self.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": on_gpu,
        }

    def transfer_batch_to_device(
        self, batch: PairBatch | PromptBatch, device: torch.device, dataloader_idx: int
    ) -> PairBatch | PromptBatch:
        # Lightning lets only single tensors go without waiting.
        return batch.to(device, non_blocking=device.type == "cuda")

    def rows_without(self, name: str, known: Container[bytes]) -> list[int]:
        """A split's rows of which a response's key is not known, by their place in it.

        Args:
            name: ``train``, ``validation`` or ``test``; one that there is not has no rows.
            known: keys as :func:`rotopo.data.batch.response_key` makes them.
        """
        if name not in self._pairs:
            return []
        rows = self.rows(name)
        return [
            index
            for index, row in enumerate(map(rows.__getitem__, range(len(rows))))
            if any(response_key(row.prompt, response) not in known for response in row.responses)
        ]

    def batches(self, rows: Rows, places: Sequence[int]) -> DataLoader:
        """Some rows, each once over all ranks, in as many batches on each rank.

        Where they are fewer than ranks, the first comes again. The loader's
        ``batch_sampler.batches`` say which of the places are in each of this rank's batches; one
        that comes again has a number of its own, behind the last.

        Args:
            rows: the rows.
            places: which of them.
        """
        places = [*places, *list(places[:1]) * (self._ranks()[0] - len(places))]
        lengths = rows.lengths()
        return self._in_similar_lengths(Subset(rows, places), [lengths[place] for place in places])

    def rows(self, name: str) -> Rows:
        """A split's rows with the responses that the module which trains on them asks for.

        Args:
            name: ``train``, ``validation`` or ``test``.

        Raises:
            InputError: it asks for what the data does not have, or a row is longer than the model
                can read.
        """
        module: Any = self.trainer.lightning_module if self.trainer else None
        needs = getattr(module, "needs", None)
        # Kept: loaders are made more than once, and mismatches and samples take their time.
        if (name, needs) not in self._rows_of:
            made = Rows(self._pairs[name]) if needs is None else self._rows_for(name, module)
            refuse_beyond(made, self._positions, name)
            self._rows_of[name, needs] = made
        return self._rows_of[name, needs]

    def _rows_for(self, name: str, module: Any) -> Rows:
        needs = module.needs
        pairs, objective = self._pairs[name], type(module).__name__
        single = unpaired_rows(pairs)
        if needs.pairs and single:
            raise InputError(
                f"{objective} compares two responses, but {single} of {len(pairs)} rows ({name}) "
                "have one: take an objective for unpaired data (KTO, BCO, NCA, SPPO, APO, SFT)."
            )
        columns: dict[Role, list[list[int]]] = {}
        for column, role in _EXTRA_ROLES.items():
            if role not in needs.roles:
                continue
            if column in self.extra_responses:
                columns[role] = pairs[column][:]
            elif role == Role.REFERENCE_SAMPLE:
                columns[role] = self._sampled(name, module)
            else:
                raise InputError(
                    f"{objective} works on a {column} response to each prompt: name its column in "
                    f"data.extra_responses, {{{column}: COLUMN}}."
                )
        return Rows(
            pairs,
            needs.roles,
            columns,
            self.encoder.max_length,
            self.seed,
            self._behind(),
            None if self.margin is None else self._margins(name, objective, needs.margins),
        )

    def _behind(self) -> int | None:
        """The token behind every response, for a module that reads its last token's state."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        needs = getattr(module, "needs", None)
        return self.pad_id if needs is not None and needs.ends else None

    def _margins(self, name: str, objective: str, used: bool) -> list[float]:
        """The margin of each pair of a split, from the column ``data.margin``."""
        assert self.margin is not None
        if not used:
            raise InputError(
                f"data.margin: {objective} takes no margins of the data, only reward models do: "
                "leave it out."
            )
        values = self.column(name, self.margin, "data.margin")
        margins: dict[int, float] = {}
        for row, value in values.items():
            margin = number(value)
            if margin is None:
                raise InputError(
                    f"data.margin: {self.source}, row {row} (from 0): {self.margin} is {value!r}, "
                    "which is no number."
                )
            margins[row] = margin
        return [margins[row] for row in self._pairs[name]["row"][:]]

    def _sampled(self, name: str, module: Any) -> list[list[int]]:
        """Responses from the module's reference to a split's prompts."""
        prompts = self._pairs[name]["prompt"][:]
        room = [self.encoder.max_length - len(prompt) for prompt in prompts]
        samples = module.sample_reference(prompts, self)
        return [ids[:n] for ids, n in zip(samples, room, strict=True)]

    def _eval_loader(self, name: str) -> DataLoader:
        rows = self.rows(name)
        return self._in_similar_lengths(rows, rows.lengths())

    def _in_similar_lengths(
        self, rows: Rows | Subset[TokenizedRow], lengths: Sequence[PairLength]
    ) -> DataLoader:
        sampler = EvalSampler(
            lengths,
            self.token_budget,
            self.eval_pairs_per_batch,
            *self._ranks(),
            self.layout,
        )
        return DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=partial(_collate_mean, pad_id=self.pad_id, layout=self.layout),
            **self._beside_the_step(),
            # Iterating draws a seed: from here, so that evaluation leaves training's alone.
            generator=torch.Generator(),
        )


def _nothing_to_train_on() -> InputError:
    return InputError("data.validation or data.test is 1: there is no pair to train on.")


def _collate_mean(rows: list[TokenizedRow], pad_id: int, layout: Layout) -> PairBatch:
    """A batch whose loss is the mean over its pairs."""
    return collate(rows, pad_id, layout, loss_scale=1 / len(rows))


def _collate_prompts(rows: list[TokenizedRow], pad_id: int) -> PromptBatch:
    return collate_prompts([row.prompt for row in rows], pad_id, [row.row for row in rows])
