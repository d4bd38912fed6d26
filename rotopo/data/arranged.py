"""Settings of the data -> the sources of a run, and its sets to evaluate on."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from rotopo.data.one_source import OneSource, Source
from rotopo.data.settings import at_least, refuse
from rotopo.data.splits import Splits
from rotopo.errors import InputError, at_once

# Pairs to hold out: a share of the training pairs, another split of their source, or sets by name,
# each of them a share, a place where rows are, or all that there is to say of a source.
HeldOut = float | str | Mapping[str, float | str | Source]
_ONLY_FOR_TRAINING = ("name", "weight", "repetitions")
# Sets of these names would have metrics whose names others have: test/rewards/accuracy.
_TAKEN = ("rewards", "yardstick")


class Arranged(NamedTuple):
    """Sources of training, further sets, and labels, as :class:`rotopo.data.pairs.Pairs` has
    them."""

    sources: list[OneSource]
    sets: dict[str, list[OneSource]]
    labels: dict[str, list[str | None]]


def arranged(
    source: str | Sequence[str | Source], common: Source, held_out: Mapping[str, HeldOut], seed: int
) -> Arranged:
    """The sources and sets that settings name.

    Args:
        source: ``data.source``.
        common: what holds for all sources that do not say otherwise.
        held_out: ``data.validation`` and ``data.test``, by name.
        seed: of what is held out.

    Raises:
        InputError: a setting is missing, out of its range, or does not go with the others.
    """
    listed = [source] if isinstance(source, str) else source
    whole = [(Source(one) if isinstance(one, str) else one).over(common) for one in listed]
    with at_once() as check:
        check(_check, whole)
        shares = {name: check(_share, name, value) for name, value in held_out.items()}
    sources = [
        OneSource(
            one,
            one.name or _name(str(one.source)),
            Splits(
                str(one.source),
                str(one.split),
                shares["validation"],
                shares["test"],
                one.group_by,
                seed,
            ),
        )
        for one in whole
    ]
    twice = [name for name, n in Counter(one.name for one in sources).items() if n > 1]
    if twice:
        raise InputError(f"data.source: several are called {twice[0]!r}: give each a name.")
    names: list[str | None] = [None if isinstance(source, str) else one.name for one in sources]
    labels = {"train": names}
    sets: dict[str, list[OneSource]] = {}
    for name, value in held_out.items():
        labels[name] = names
        if isinstance(value, Mapping):
            own = [key for key, one in value.items() if isinstance(one, int | float)]
            labels[name] = [own[0] if own else None] * len(sources)
            sets[name] = [
                _set(name, key, one, whole, seed)
                for key, one in value.items()
                if not isinstance(one, int | float)
            ]
            for one in sets[name]:
                _refuse_trained_on(f"data.{name}.{one.name}", one, sources)
    _check_names([*names, *(k for v in held_out.values() if isinstance(v, Mapping) for k in v)])
    return Arranged(sources, sets, labels)


def _check(whole: Sequence[Source]) -> None:
    if not whole:
        raise InputError("data.source is an empty list: name a source.")
    with at_once() as check:
        weights = [one.weight for one in whole]
        if None in weights and any(weight is not None for weight in weights):
            check(refuse, "data.source: give all sources a weight, or none.")
        for place, one in enumerate(whole):
            check(_check_one, one, place)


def _check_one(one: Source, place: int) -> None:
    if one.source is None:
        raise InputError(f"data.source, number {place} (from 0), has no source: set it.")
    with at_once() as check:
        if one.weight is not None and one.repetitions is not None:
            check(
                refuse,
                f"data.source: {one.source} has a weight and repetitions: an epoch ends as the "
                "first source has been through its pairs, so leave one of them out.",
            )
        for name in ("weight", "repetitions"):
            value = getattr(one, name)
            if value is not None and not 0 < value < float("inf"):
                check(
                    refuse,
                    f"data.source: the {name} of {one.source} is {value}: it has to be above zero.",
                )
        check(at_least, "source.rows", one.rows, 1)


def _check_names(names: Sequence[str | None]) -> None:
    for name in names:
        if name is not None and (name in _TAKEN or not re.fullmatch(r"[\w.-]+", name)):
            raise InputError(
                f"data: the name {name!r} of a source or a set becomes a part of metrics' names: "
                "write it with letters, digits, '_', '-' and '.', and other than "
                f"{' and '.join(_TAKEN)}."
            )


def _share(name: str, value: HeldOut) -> float | str:
    """What of the training's sources is held out."""
    if not isinstance(value, Mapping):
        return value
    if not value:
        raise InputError(f"data.{name} names no set: write 0 for none.")
    shares = [one for one in value.values() if isinstance(one, int | float)]
    if len(shares) > 1:
        raise InputError(
            f"data.{name} has {len(shares)} shares of the training pairs, and there is one to hold "
            "out: give one number."
        )
    return shares[0] if shares else 0.0


def _set(
    name: str, key: str, value: str | Source, training: Sequence[Source], seed: int
) -> OneSource:
    """One set to evaluate on."""
    setting = f"data.{name}.{key}"
    own = Source(value) if isinstance(value, str) else value
    for given in _ONLY_FOR_TRAINING:
        if getattr(own, given) is not None:
            raise InputError(f"{setting}.{given} is for sources to train on: leave it out.")
    if own.source is None:
        if len(training) > 1:
            raise InputError(
                f"{setting} has no source: say which of data.source's it is a split of."
            )
        if own.split is None:
            raise InputError(f"{setting}: name a split of data.source, or a source of its own.")
        own = own.over(Source(**vars(training[0]) | {"rows": None, "repetitions": None}))
    shares = {"validation": 0.0, "test": 0.0} | {name: 1.0}
    splits = Splits(
        str(own.source),
        own.split or "train",
        shares["validation"],
        shares["test"],
        own.group_by,
        seed,
    )
    return OneSource(own, key, splits)


def _refuse_trained_on(setting: str, one: OneSource, sources: Sequence[OneSource]) -> None:
    (own,) = (name.partition("[")[0] for name in one.splits.named)
    for trained in sources:
        theirs = {name.partition("[")[0] for name in trained.splits.named}
        if one.path == trained.path and own in theirs:
            raise InputError(
                f"{setting}: the split {one.splits.train_split!r} of {one.path} is what is trained "
                "on: name another split, or give a number, the share to hold out."
            )


def _name(source: str) -> str:
    """What names a source without its folder and ending: film_pairs of data/film_pairs.jsonl.gz."""
    path = source.removeprefix("package:").removeprefix("python:").partition(":")[0]
    last = re.sub(r"\.(json|jsonl|csv|parquet|arrow)(\.\w+)?$", "", PurePath(path).name)
    return re.sub(r"[^\w.-]", "_", last) or "source"
