"""Tokenised pairs -> the rows of a batch, with the responses that the objective asks for."""

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from rotopo.data.batch import Role, TokenizedRow, response_key
from rotopo.data.sampler import PairLength
from rotopo.errors import InputError
from rotopo.pretrained import Positions

if TYPE_CHECKING:  # else rotopo --help would wait for them
    import pyarrow as pa
    from datasets import Dataset

_PAIR = {"chosen": Role.CHOSEN, "rejected": Role.REJECTED}


class Rows(torch.utils.data.Dataset[TokenizedRow]):
    """Tokenised pairs, one by one.

    With :attr:`Role.MISMATCHED` every row brings along the responses of another one, with another
    prompt, which the seed chooses: so the mismatches depend neither on the batches nor on the
    ranks. They are cut on their right where the row would be over ``max_length``.

    A reward is read at a response's last token, which is a target and no input of a batch. So
    reward models have a further token put ``behind`` every response, which takes the last token's
    part: it is never read, and all that is computed stays within ``max_length``.

    Args:
        pairs: columns ``prompt``, ``chosen``, ``rejected`` and ``row``; an empty response is none.
        roles: further responses.
        columns: token ids of those responses that each row has of its own [rows].
        max_length: tokens of a prompt and a response at most.
        seed: seed of the mismatches.
        behind: the token to put behind every response; None puts none.
        margins: what each row's chosen reward has to be above its rejected's by [rows].

    Raises:
        InputError: mismatches are asked for, and all prompts are the same.
    """

    def __init__(
        self,
        pairs: "Dataset",
        roles: Sequence[Role] = (),
        columns: Mapping[Role, Sequence[list[int]]] | None = None,
        max_length: int = 0,
        seed: int = 0,
        behind: int | None = None,
        margins: Sequence[float] | None = None,
    ) -> None:
        self.pairs = pairs
        self.roles = roles
        self.seed = seed
        self.behind = [] if behind is None else [behind]
        self.margins = margins
        self.columns = columns or {}
        self.max_length = max_length
        self.partners = _partners(pairs, seed) if Role.MISMATCHED in roles else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedRow:
        pair = self.pairs[index]
        prompt = pair["prompt"]
        responses = [(role, pair[name]) for name, role in _PAIR.items()]
        responses += [(role, column[index]) for role, column in self.columns.items()]
        if self.partners is not None:
            other, room = self.pairs[self.partners[index]], self.max_length - len(prompt)
            responses += [(Role.MISMATCHED, other[name][:room]) for name in _PAIR]
        responses = [(role, ids) for role, ids in responses if ids]
        return TokenizedRow(
            prompt,
            [ids + self.behind for _, ids in responses],
            [role for role, _ in responses],
            pair["row"],
            0.0 if self.margins is None else self.margins[index],
        )

    def unknown(self, known: Container[bytes]) -> list[int]:
        """Places of the rows of which a response's key is not known.

        Args:
            known: keys as :func:`rotopo.data.batch.response_key` makes them.
        """
        return [
            index
            for index, row in enumerate(map(self.__getitem__, range(len(self))))
            if any(response_key(row.prompt, response) not in known for response in row.responses)
        ]

    def select(
        self, kept: Sequence[int], others: Sequence[tuple[int, list[int], list[int]]] = ()
    ) -> "Rows":
        """Some of these rows, and behind them some with other responses.

        Args:
            kept: places of the rows that stay as they are.
            others: place of a row, and the chosen and the rejected response's token ids instead of
                its own; a row may come several times.
        """
        from datasets import Dataset, concatenate_datasets

        places, pairs = list(kept), self.pairs.select(kept)
        if others:
            behind, chosen, rejected = map(list, zip(*others, strict=True))
            columns = self.pairs.select(behind).to_dict() | {"chosen": chosen, "rejected": rejected}
            new = Dataset.from_dict(columns, features=self.pairs.features)
            places, pairs = places + behind, concatenate_datasets([pairs, new])
        return Rows(
            pairs,
            self.roles,
            {role: [column[place] for place in places] for role, column in self.columns.items()},
            self.max_length,
            self.seed,
            self.behind[0] if self.behind else None,
            None if self.margins is None else [self.margins[place] for place in places],
        )

    def lengths(self) -> list[PairLength]:
        """Tokens of each row's prompt and of its responses."""
        prompt, *pair = (_list_lengths(self.pairs, name) for name in ("prompt", *_PAIR))
        columns = pair + [np.array([len(ids) for ids in c]) for c in self.columns.values()]
        if self.partners is not None:
            room = self.max_length - prompt
            columns += [np.minimum(lengths[self.partners], room) for lengths in pair]
        by_row = np.stack(columns, 1).tolist()
        return [
            (p, [n + len(self.behind) for n in lengths if n])
            for p, lengths in zip(prompt.tolist(), by_row, strict=True)
        ]


def refuse_beyond(rows: Rows, positions: Positions | None, source: str) -> None:
    """Refuse rows that go on past the end of the model's positions.

    Args:
        rows: with all responses that are trained on.
        positions: the model's, if they have a limit.
        source: where the rows come from.

    Raises:
        InputError: there is such a row; names the first.
    """
    if positions is None or not positions.end:
        return
    for place, (prompt, responses) in enumerate(rows.lengths()):
        # A batch leaves out the last token of a line, which only is a target.
        read = prompt + max(responses) - 1
        if read > positions.count:
            raise InputError(
                f"{source}, row {rows.pairs[place]['row']} (from 0): it takes {read} positions, "
                f"and the model has {positions.count}: set data.max_length to {positions.count} "
                "at most."
            )


def prompts_alone(ids: Sequence[list[int]], numbers: Sequence[int]) -> "Dataset":
    """Prompts without responses, as tokenised pairs.

    Args:
        ids: token ids of each.
        numbers: of their rows.
    """
    from datasets import Dataset

    none: list[list[int]] = [[]] * len(ids)
    columns = {"prompt": ids, "chosen": none, "rejected": none, "row": numbers}
    return Dataset.from_dict(columns)


def unpaired_rows(pairs: "Dataset") -> int:
    """How many rows have a single response."""
    chosen, rejected = pair_lengths(pairs)
    return int(((chosen == 0) | (rejected == 0)).sum())


def pair_lengths(pairs: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the chosen and of the rejected responses, 0 where there is none, each [rows]."""
    return _list_lengths(pairs, "chosen"), _list_lengths(pairs, "rejected")


def _column(pairs: "Dataset", name: str) -> "pa.ChunkedArray":
    return pairs.with_format("arrow")[:].column(name)


def _list_lengths(pairs: "Dataset", name: str) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(_column(pairs, name)).to_numpy()


def _partners(pairs: "Dataset", seed: int) -> np.ndarray:
    """For each row another one with another prompt; as good as every row is one's partner."""
    hashes = [
        hash(ids.values.to_numpy().tobytes())
        for chunk in _column(pairs, "prompt").chunks
        for ids in chunk
    ]
    prompts = np.unique(hashes, return_inverse=True)[1]
    n = len(prompts)
    if n == 0 or prompts.max() == 0:
        raise InputError(
            "all prompts are the same, so that no response belongs to another prompt, from which "
            "KTO estimates z0: add rows with other prompts."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    partners = np.empty(n, dtype=np.int64)
    for k, row in enumerate(order):
        step = 1
        while prompts[order[(k + step) % n]] == prompts[row]:
            step += 1
        partners[row] = order[(k + step) % n]
    return partners
