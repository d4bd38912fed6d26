"""Settings of the data that are out of their range, refused by their names."""

from typing import Any, get_args

from rotopo.errors import InputError


def refuse(said: str) -> None:
    """Refuse settings that do not go together.

    Raises:
        InputError: says why.
    """
    raise InputError(said)


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a count that is too low; None is no limit.

    Raises:
        InputError: it is.
    """
    if value is not None and value < least:
        raise InputError(f"data.{name} is {value}: it has to be at least {least}.")


def seed_in_range(name: str, value: int) -> None:
    """Refuse a seed that NumPy's or torch's generators would not take.

    Raises:
        InputError: it is out of their range.
    """
    if not 0 <= value < 2**32:
        raise InputError(f"data.{name} is {value}: it has to be from 0 to 2**32 - 1.")


def one_of(name: str, value: Any, known: Any) -> None:
    """Refuse a value that is none of a Literal's.

    Raises:
        InputError: it is none of them.
    """
    if value not in get_args(known):
        raise InputError(f"data.{name} is {value!r}: it has to be {' or '.join(get_args(known))}.")
