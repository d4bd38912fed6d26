"""What a module asks for -> rows with the responses and margins that it trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.data.pairs import EXTRA_ROLES, Pairs
from rotopo.data.rows import Rows, unpaired_rows
from rotopo.data.values import number
from rotopo.errors import InputError

# Token ids of prompts -> a response drawn from the reference for each, the end of turn included.
Draw = Callable[[Sequence[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Ask:
    """What a module asks of the data.

    Attributes:
        needs: what it computes from.
        who: its name, for messages.
        draw: draws responses from its reference, when they are wanted; None where it cannot.
    """

    needs: Needs
    who: str
    draw: Draw | None = None


def rows_for(pairs: Pairs, name: str, ask: Ask | None) -> Rows:
    """A split's rows as somebody asks for them; the pairs alone where nobody has asked.

    Args:
        pairs: the run's.
        name: ``train``, ``validation`` or ``test``.
        ask: what is asked for.

    Raises:
        InputError: the data does not have it.
    """
    of = pairs.training() if name == "train" else pairs.of[name]
    if ask is None:
        return Rows(of)
    needs, single = ask.needs, unpaired_rows(of)
    if needs.pairs and single:
        raise InputError(
            f"{ask.who} compares two responses, but {single} of {len(of)} rows ({name}) "
            "have one: take an objective for unpaired data (KTO, BCO, NCA, SPPO, APO, SFT)."
        )
    columns: dict[Role, list[list[int]]] = {}
    for column, role in EXTRA_ROLES.items():
        if role not in needs.roles:
            continue
        if column in pairs.extra_responses:
            columns[role] = of[column][:]
        elif role == Role.REFERENCE_SAMPLE and ask.draw is not None:
            columns[role] = _drawn(pairs, name, ask.draw)
        else:
            raise InputError(
                f"{ask.who} works on a {column} response to each prompt: name its column in "
                f"data.extra_responses, {{{column}: COLUMN}}."
            )
    return Rows(
        of,
        needs.roles,
        columns,
        pairs.encoder.max_length,
        pairs.split_seed,
        pairs.encoder.pad_id if needs.ends else None,
        margins(pairs, name, ask),
    )


def margins(pairs: Pairs, name: str, ask: Ask) -> list[float] | None:
    """The margin of each pair of a split, from the columns that sources have for it (0 of a source
    without); None where none has.

    Raises:
        InputError: whoever asks takes none, or a value is no number.
    """
    rows = pairs.of[name]["row"][:]
    values = pairs.parts[name].margins(rows)
    if values is None:
        return None
    if not ask.needs.margins:
        raise InputError(
            f"data.margin: {ask.who} takes no margins of the data, only reward models do: "
            "leave it out."
        )
    found: dict[int, float] = {}
    for row, value in values.items():
        margin = number(value)
        if margin is None:
            part = pairs.parts[name].part_of(row)
            raise InputError(
                f"data.margin: {part.source.path}, row {row - part.first} (from 0): "
                f"{part.source.settings.margin} is {value!r}, which is no number."
            )
        found[row] = margin
    return [found.get(row, 0.0) for row in rows]


def _drawn(pairs: Pairs, name: str, draw: Draw) -> list[list[int]]:
    """Responses from the reference to a split's prompts, as long as a row may be at most."""
    prompts = pairs.of[name]["prompt"][:]
    room = [pairs.encoder.max_length - len(prompt) for prompt in prompts]
    return [ids[:n] for ids, n in zip(draw(prompts), room, strict=True)]
