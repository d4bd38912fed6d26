"""PairwiseDataModule: preference data from its source to batches."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from rotopo.data.arranged import Arranged, arranged
from rotopo.data.asked import Ask, Draw, rows_for
from rotopo.data.batch import Layout, PairBatch, PromptBatch, collate
from rotopo.data.doctor.diagnosis import diagnose
from rotopo.data.doctor.examination import Finding
from rotopo.data.examined import patient
from rotopo.data.filters import RowFilter
from rotopo.data.loaders import Accumulate, Batching, Loaders
from rotopo.data.needs import Needs
from rotopo.data.noise import LabelNoise
from rotopo.data.one_source import Source
from rotopo.data.pairs import Pairs
from rotopo.data.predicted import Predicted
from rotopo.data.resumed import check_same_order, position
from rotopo.data.rows import Rows, refuse_beyond
from rotopo.data.sampler import StatefulLoader
from rotopo.data.selector import Selector
from rotopo.data.tokenized import Truncation
from rotopo.data.tokens import OnBadRow, OnUnwritten, PairEncoder
from rotopo.errors import InputError, at_once
from rotopo.pretrained import cache_dir as default_cache_dir


class PairwiseDataModule(LightningDataModule):
    """Preference pairs: loaded, tokenised once, split, and batched.

    The held-out rows are chosen by the seed among the rows as stored, before any is dropped, so
    no other setting moves a row from one split to another.

    Args:
        tokenizer: the model's name, folder or GGUF file, or ``package:PACKAGE/FILE``; normally
            the same as ``policy.path``.
        source: a data set on the Hub (``name`` or ``name:config``), a json, jsonl, csv, parquet
            or arrow file, a glob or folder of them, ``package:PACKAGE/FILE``, or
            ``python:package.module.function`` (``:ARGUMENT`` behind it, if it takes one). Or
            several, as a list of these or of :class:`rotopo.data.one_source.Source`, each with
            settings of its own and its share of every epoch, see
            :class:`rotopo.data.mixture.SourceMixture`.
        format: the rows' format by name (explicit, implicit, ultrafeedback, hh, align_anything,
            sharegpt, kto), or the dotted path of a function row -> Preference; None detects it.
        columns: the source's columns by the format's names for them, ``{prompt: instruction}``.
        filter: which rows are used, by the class path of a :class:`rotopo.data.filters.RowFilter`:
            Among, Between, Apart, or your own. None uses all.
        train_split: the source's split to train on.
        validation: the fraction of the training split to hold out for validation, or the name of
            another split; 0 for none. Or several sets by name, ``{held_out: 0.05, qa: FILE}``:
            each is a fraction, a source, or a :class:`rotopo.data.one_source.Source` with settings
            of its own, and has metrics of its own (``val/qa/loss``).
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
        prompts: a file of prompts, or of an evaluation's questions, that ``predict`` responds to
            instead of the held-out prompts, see :class:`rotopo.data.prompts.Prompts`.
        answers_as: the model's name there; None takes that of its files and its objective.
        eval_pairs_per_batch: pairs of a validation, test or prediction batch at most.
        token_budget: tokens of a micro-batch at most, padding included: steps are cut into as many
            micro-batches as that takes, see :mod:`rotopo.run.accumulation`. None for no limit.
        layout: ``packed`` computes a prompt once for both responses, and no padding;
            ``shared_prompt`` a prompt once, on a line for each row, which costs less under a dense
            attention mask (``policy.attention`` sdpa or eager); ``padded`` a prompt twice.
        length_window: make the pairs of a step similar in length: those of so many steps are
            sorted before they are cut into steps. 1 leaves a step's pairs to chance, as papers do.
            Of a mixture a window has the sources' shares then, and not each of its steps.
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
        seed: seed of the order of training.
        split_seed: seed of the held-out rows, and of which pairs are trained on where not all are;
            None takes ``seed``.
        cache_dir: folder for the tokenised data; None takes $ROTOPO_CACHE or ~/.cache/rotopo.
        doctor: have every fit begin with the checks of ``rotopo doctor``, of which errors stop it;
            see :mod:`rotopo.data.doctor`. False is for data that is wrong on purpose.
    """

    def __init__(
        self,
        tokenizer: str,
        source: str | list[str | Source],
        format: str | None = None,
        columns: dict[str, str] | None = None,
        filter: RowFilter | None = None,
        train_split: str = "train",
        validation: float | str | dict[str, float | str | Source] = 0.05,
        test: float | str | dict[str, float | str | Source] = 0.0,
        group_by: str | None = None,
        extra_responses: dict[str, str] | None = None,
        margin: str | None = None,
        train_pairs: int | None = None,
        balance_lengths: bool = False,
        noise: LabelNoise | None = None,
        accuracy_by: str | None = None,
        pairs_per_step: int = 32,
        score: str | None = None,
        prompts: str | None = None,
        answers_as: str | None = None,
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
        split_seed: int | None = None,
        cache_dir: str | None = None,
        doctor: bool = True,
    ) -> None:
        super().__init__()
        self.batching: Batching
        self.pairs: Pairs
        held_out = {"validation": validation, "test": test}
        common = Source(
            split=train_split,
            format=format,
            columns=columns,
            filter=filter,
            group_by=group_by,
            margin=margin,
        )
        split_seed = seed if split_seed is None else split_seed
        with at_once() as check:
            found = check(arranged, source, common, held_out, split_seed) or Arranged([], {}, {})
            self.batching = check(
                Batching,
                layout=layout,
                token_budget=token_budget,
                pairs_per_step=pairs_per_step,
                eval_pairs_per_batch=eval_pairs_per_batch,
                length_window=length_window,
                num_workers=num_workers,
                seed=seed,
            )
            self.pairs = check(
                Pairs,
                tokenizer_path=tokenizer,
                encoding={
                    "chat_template": chat_template,
                    "chat_template_kwargs": chat_template_kwargs,
                    "system_message": system_message,
                    "pad_token": pad_token,
                    "max_length": max_length,
                    "truncation": truncation,
                },
                **found._asdict(),
                split_seed=split_seed,
                extra_responses=extra_responses or {},
                train_pairs=train_pairs,
                balance_lengths=balance_lengths,
                noise=noise,
                accuracy_by=accuracy_by,
                template_time=template_time,
                split_dialogues=split_dialogues,
                on_bad_row=on_bad_row,
                on_unwritten=on_unwritten,
                num_proc=num_proc,
                cache_dir=Path(cache_dir).expanduser() if cache_dir else default_cache_dir(),
                say=rank_zero_info,
                warn=rank_zero_warn,
            )
        self.score, self.prompts, self.answers_as, self.doctor = score, prompts, answers_as, doctor
        self.changed: Sequence[str] = ()  # settings that are not a checkpoint's, for messages
        self._asked: Ask | None = None
        self._rows_of: dict[str, Rows] = {}  # as they are asked for
        self._selector: Selector | None = None
        self.accumulate: Accumulate | None = None  # of the fit at hand

    def ask(self, needs: Needs, who: str, draw: Draw | None = None) -> None:
        """Say what the rows have to bring along; until the next :meth:`setup`.

        Args:
            needs: what the module computes from.
            who: its name, for messages.
            draw: draws responses from its reference, once they are wanted.
        """
        self._asked, self._rows_of = Ask(needs, who, draw), {}

    def let_choose(self, selector: Selector) -> None:
        """Let a selector decide before every epoch of the fit what to train on.

        Args:
            selector: forgotten by the next fit's :meth:`setup`.
        """
        self._selector = selector

    @property
    def encoder(self) -> PairEncoder:
        """How preferences become tokens; its ``tokenizer`` is the one to save with a model."""
        return self.pairs.encoder

    @property
    def pad_id(self) -> int:
        """Id of the token that fills up batches."""
        return self.encoder.pad_id

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end a generation."""
        return self.encoder.stop_ids

    @cached_property
    def predicted(self) -> Predicted:
        """The rows of :meth:`predict_dataloader`, and what is written beside their predictions."""
        return Predicted(self.pairs, self.score, self.prompts, self.answers_as)

    def prediction_fingerprint(self) -> str:
        """Hash of what :meth:`predict_dataloader` gives: rows and their division into batches."""
        return self.predicted.fingerprint(self.batching.eval_pairs_per_batch, self.batching.layout)

    def prepare_data(self) -> None:
        if not self.pairs.of and not self._needs_no_source():
            self.pairs.load()

    def setup(self, stage: str | None = None) -> None:
        self._asked, self._rows_of = None, {}  # another module may be next
        if stage == "fit":
            # Those of another run; this one's come next.
            self._selector = self.accumulate = None
        if not self.pairs.of and not self._needs_no_source():
            self._agree_on_clock()
            self.pairs.divide()
            if stage != "doctor":  # which finds it among other things
                self.pairs.refuse_unwritten()

    def findings(self, needs: Needs | None = None) -> list[Finding]:
        """What the data doctor finds, once the data is set up.

        Args:
            needs: of what is to be trained on it.

        Raises:
            InputError: there is no pair to train on.
        """
        return diagnose(patient(self.pairs, self.pairs.positions, needs is not None and needs.ends))

    def train_dataloader(self) -> StatefulLoader:
        rows = self.rows("train")
        if self._selector is not None:
            assert self.trainer is not None
            rows = self._selector.training_rows(self.trainer, rows)
        mixture = self.pairs.mixture(rows.pairs)
        return self._loaders().training(rows, mixture, self.accumulate)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.has("validation"):
            return self._loaders().evaluation(self.rows("validation"))
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        raise InputError("data.validation is 0: there is nothing to validate on.")

    def test_dataloader(self) -> DataLoader:
        if not self.has("test"):
            raise InputError("data.test is 0: there is nothing to test on.")
        return self._loaders().evaluation(self.rows("test"))

    def predict_dataloader(self) -> DataLoader:
        """What ``predict`` works on: prompts to respond to, or the responses of ``data.score``.

        The prompts are those of the test split, or of the validation split where there is no
        test, each once, by the first row that has it. Batches hold prompts of similar lengths, the
        longest first.
        """
        rows = self.predicted.rows(self._asked is not None and self._asked.needs.ends)
        if self.score is not None:
            refuse_beyond(rows, self.pairs.positions, f"data.score: {self.score}")
        return self._loaders().prediction(rows, self.score is not None)

    def batches(self, rows: Rows, places: Sequence[int]) -> DataLoader:
        """Some rows, as :meth:`rotopo.data.loaders.Loaders.some` divides them."""
        return self._loaders().some(rows, places)

    def _loaders(self) -> Loaders:
        return Loaders.of(self.batching, self.pad_id, self.trainer)

    def transfer_batch_to_device(
        self, batch: PairBatch | PromptBatch, device: torch.device, dataloader_idx: int
    ) -> PairBatch | PromptBatch:
        # Lightning lets only single tensors go without waiting.
        return batch.to(device, non_blocking=device.type == "cuda")

    def has(self, name: str) -> bool:
        """Whether there are rows of ``train``, ``validation`` or ``test``."""
        return name in self.pairs.of

    def rows(self, name: str) -> Rows:
        """A split's rows with the responses that have been asked for.

        Args:
            name: ``train``, ``validation`` or ``test``.

        Raises:
            InputError: the data does not have what is asked for, or a row is longer than the
                model can read.
        """
        # Kept: loaders are made more than once, and mismatches and samples take their time.
        if name not in self._rows_of:
            made = rows_for(self.pairs, name, self._asked)
            refuse_beyond(made, self.pairs.positions, name)
            self._rows_of[name] = made
        return self._rows_of[name]

    def probe(self, pairs: int) -> PairBatch:
        """The first validation pairs (training pairs where there are none), as one batch that is
        the same on every rank and at any time."""
        rows = self.rows("validation" if self.has("validation") else "train")
        return collate(
            [rows[i] for i in range(min(pairs, len(rows)))], self.pad_id, self.batching.layout, 1
        )

    def state_dict(self) -> dict[str, Any]:
        """What a position in the epoch means nothing without."""
        selection = self._selector.settings() if self._selector is not None else None
        return position(self.pairs, self.batching, selection)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on training where the position in the epoch would mean something else.

        Raises:
            InputError: the checkpoint's training pairs or their order are not these.
        """
        assert self.trainer is not None
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_same_order(state_dict, self.state_dict(), self.changed)

    def take_clock(self, checkpoint: Mapping[str, Any]) -> None:
        """Have the chat template take a checkpoint's time for the present, unless a setting says
        which."""
        self.pairs.take_clock((checkpoint.get(type(self).__qualname__) or {}).get("template_time"))

    def _agree_on_clock(self) -> None:
        """Take the first rank's time."""
        if self.trainer is None or not self.encoder.template.reads_clock:
            return
        time = self.trainer.strategy.broadcast(self.pairs.template_time)
        if time is not None:
            self.pairs.set_clock(time)

    def _needs_no_source(self) -> bool:
        """Whether the run has no use for the source."""
        predicting = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        return predicting and (self.score or self.prompts) is not None
