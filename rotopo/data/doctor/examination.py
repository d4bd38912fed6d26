"""What the data doctor's checks look at, and what they report."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from rotopo.data.doctor import limits
from rotopo.data.doctor.token_columns import TokenColumn, read_column
from rotopo.data.messages import Message
from rotopo.data.preference import Preference
from rotopo.data.tokenized import TokenizedPair
from rotopo.data.tokens import PairEncoder
from rotopo.pretrained import Positions

if TYPE_CHECKING:  # else rotopo --help would wait for it
    from datasets import Dataset

    from rotopo.data.token_cache import LeftOut


class Severity(StrEnum):
    """What a finding means for a run."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What one check has measured.

    Attributes:
        check: its name.
        severity: what it means.
        numbers: what was measured, by name; shares are in [0, 1], lengths in tokens.
        advice: what to do about it, with the setting to change; empty where all is well.
    """

    check: str
    severity: Severity
    numbers: Mapping[str, int | float | str]
    advice: str = ""


@dataclass(frozen=True)
class Patient:
    """The data of a run.

    Attributes:
        encoder: what made the tokens.
        pairs: tokenised pairs of ``train``, and of ``validation`` and ``test`` if there are such,
            labelled as in the source: columns ``row``, ``prompt``, ``chosen``, ``rejected``, and
            further responses.
        drawn: the training pairs as they are trained on: flipped by noise (a column ``flipped``
            says where), drawn again for balance.
        read: a row of a split, by its number in the source.
        outcomes: rows of the source by what became of them, as
            :attr:`rotopo.data.token_cache.TokenizedRows.counts`.
        vocabulary: V, the rows of the model's embedding; None if its configuration is not at hand.
        group_by: the column that keeps groups together, if any.
        positions: how far the model counts; None where it has no limit, or is not at hand.
        ends: whether the model also reads the last token of a response, as reward models do.
        left_out: what of the rows the chat template does not write, by what it is.
        tolerated: whether that is accepted, where it matters.
        unread: columns of the source that nothing reads.
    """

    encoder: PairEncoder
    pairs: "dict[str, Dataset]"
    drawn: "Dataset"
    read: Callable[[str, int], Preference]
    outcomes: Mapping[str, int]
    vocabulary: int | None = None
    group_by: str | None = None
    positions: Positions | None = None
    ends: bool = False
    left_out: "Mapping[str, LeftOut]" = field(default_factory=dict)
    tolerated: bool = False
    unread: Sequence[str] = ()


@dataclass(frozen=True)
class Sampled:
    """A training row, read and tokenised again."""

    row: int
    preference: Preference
    whole: TokenizedPair  # not cut
    stored: TokenizedPair

    @property
    def responses(self) -> Iterator[tuple[str, list[Message], list[int]]]:
        """Of chosen and rejected, where they are there: which it is, turns and token ids."""
        for name, turns, ids in (
            ("chosen", self.preference.chosen, self.whole.chosen),
            ("rejected", self.preference.rejected, self.whole.rejected),
        ):
            if turns is not None:
                yield name, turns, ids


class Examination:
    """A patient, and what several checks ask about."""

    def __init__(self, patient: Patient) -> None:
        self.patient = patient
        self.encoder = encoder = patient.encoder
        tokenizer = encoder.tokenizer
        self.bos, self.eos = (
            cast(int | None, token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        watched = {self.bos, self.eos, encoder.pad_id, encoder.end_of_turn_id} - {None}
        numbers: dict[bytes, int] = {}
        self.columns = {
            split: {
                name: read_column(pairs, name, cast(set[int], watched), numbers)
                for name in pairs.column_names
                if name not in ("row", "flipped")
            }
            for split, pairs in patient.pairs.items()
        }
        self.rows = {
            split: np.asarray(pairs.with_format("numpy")["row"][:])
            for split, pairs in patient.pairs.items()
        }
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        self.opening = encoder.encode_prompt(turns[:1])
        self.dialogue = encoder.encode_prompt(turns)

    def responses(self, split: str) -> dict[str, TokenColumn]:
        """Columns of responses, in which 0 tokens stand for none."""
        return {name: c for name, c in self.columns[split].items() if name != "prompt"}

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each prompt and its longest response [N]."""
        longest = np.max([c.lengths for c in self.responses(split).values()], axis=0)
        return self.columns[split]["prompt"].lengths + longest

    def at_limit(self, split: str) -> np.ndarray:
        """Rows that fill max_length, as cut ones do [N]."""
        return self.lengths(split) >= self.encoder.max_length

    def first_row(self, where: dict[str, np.ndarray]) -> str:
        """The first row, in the order of the splits, of which something holds [N each]."""
        for split, mask in where.items():
            if mask.any():
                return f"row {self.rows[split][mask.argmax()]} of {split}"
        return ""

    def sampled(self, among: np.ndarray) -> list[Sampled]:
        """Some of the training rows, out of those that ``among`` says [N]."""
        places = np.flatnonzero(among)
        chosen = np.random.default_rng(0).permutation(places)[: limits.SAMPLE]
        rows = []
        for place in np.sort(chosen).tolist():
            stored = self.patient.pairs["train"][place]
            preference = self.patient.read("train", stored["row"])
            extra = {role: stored[role] for role in preference.extra}
            rows.append(
                Sampled(
                    stored["row"],
                    preference,
                    self.encoder.encode(preference),
                    TokenizedPair(stored["prompt"], stored["chosen"], stored["rejected"], extra),
                )
            )
        return rows

    @cached_property
    def prompts(self) -> dict[str, np.ndarray]:
        """A number for each row's prompt before it was cut, the same for the same prompt, by
        split [N each]."""
        outcomes = self.patient.outcomes
        if outcomes["prompt_cut"] + outcomes["response_cut"] == 0:
            return {split: columns["prompt"].texts for split, columns in self.columns.items()}
        # What is left of two prompts may be the same.
        numbers: dict[bytes, int] = {}
        by_split = {}
        for split, rows in self.rows.items():
            prompts = (json.dumps(self.patient.read(split, row).prompt) for row in rows.tolist())
            digests = (hashlib.blake2b(prompt.encode(), digest_size=16) for prompt in prompts)
            by_split[split] = np.array(
                [numbers.setdefault(digest.digest(), len(numbers)) for digest in digests]
            )
        return by_split

    @cached_property
    def sample(self) -> list[Sampled]:
        return self.sampled(np.ones(len(self.rows["train"]), dtype=bool))


def graded(error: bool, warning: bool) -> Severity:
    if error:
        return Severity.ERROR
    return Severity.WARNING if warning else Severity.OK


def found(
    check: str, severity: Severity, numbers: Mapping[str, int | float | str], advice: str
) -> Finding:
    # Numbers of numpy's are not JSON's.
    numbers = {k: v.item() if isinstance(v, np.generic) else v for k, v in numbers.items()}
    return Finding(check, severity, numbers, "" if severity == Severity.OK else advice)
