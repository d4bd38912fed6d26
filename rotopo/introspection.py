"""Classes as :mod:`rotopo.described` has them, from the classes themselves."""

import enum
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from rotopo.described import Described, Description, Setting
from rotopo.parsing import Argument, arguments_of, class_path, class_paths

# Whose classes are kinds, of which a setting takes one by its class path.
_KINDS_OF = ("rotopo", "lightning", "peft")
_TORCHS = ("torch.optim",)


# What these work on is given to them, and no setting.
MADE = (Optimizer, LRScheduler, ReduceLROnPlateau)


class Live(Description):
    """A description that imports what it does not know, of a command line that the parser has
    refused: where a class may take more than it names, that is what was refused."""

    def of(self, path: str) -> Described | None:
        found = super().of(path) or self._imported(path)
        return None if found is None else replace(found, open=False)

    def _imported(self, path: str) -> Described | None:
        module, _, name = path.rpartition(".")
        try:
            kind = getattr(import_module(module), name)
            return described(kind, arguments_of(kind, issubclass(kind, MADE)))
        except Exception:  # whatever a user's file does when it is imported: the parser says it
            return None


def live(description: Description) -> Description:
    """The same, which imports what it does not know, or knows of another version."""
    return Live(**{one.name: getattr(description, one.name) for one in fields(description)})


def described(kind: type, arguments: Iterable[Argument]) -> Described:
    """A class, from what :func:`rotopo.parsing.arguments_of` says that it takes."""
    path = class_path(kind)
    defined = f"{kind.__module__}.{kind.__qualname__}"
    return Described(
        path,
        first_sentence(kind.__doc__),
        settings_from(arguments),
        defined="" if defined == path else defined,
        bases=tuple(class_path(base) for base in kind.__mro__[1:-1] if _counts(base)),
        abstract=inspect.isabstract(kind),
        open=_takes_any(kind),
    )


def settings_from(arguments: Iterable[Argument]) -> tuple[Setting, ...]:
    """Settings; those of a group are the group's own."""
    found: list[Setting] = []
    groups: list[str] = []
    for one in arguments:
        if one.name.startswith(tuple(f"{group}." for group in groups)):
            continue
        if one.is_group:
            groups.append(one.name)
        found.append(
            Setting(
                one.name,
                shown(one.hint),
                None if one.is_group else plain(one.default),
                one.required,
                first_sentence(one.doc) if one.doc[:11] != "One or more" else "",
            )
        )
    return tuple(found)


def named_in(hint: Any) -> Iterator[type]:
    """Kinds of classes and groups of settings in a type; of a callable what it returns."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Callable:
        inner = inner[-1:]
    if origin is not Literal and inner:
        for one in inner:
            yield from named_in(one)
    elif isinstance(hint, type) and (_is_kind(hint) or is_group(hint)):
        yield hint


def members(kind: type) -> Mapping[str, type]:
    """Classes of a kind, by their paths; none that is private or nested in another."""
    return {
        path: one
        for path, one in class_paths(kind).items()
        if not one.__name__.startswith("_") and "." not in one.__qualname__
    }


def shown(hint: Any) -> str:
    """A type as it is shown: names alone, without the modules."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (None, NoneType):
        return "None"
    if origin in (Union, UnionType):
        names = [shown(one) for one in inner]
        names = [name for name in dict.fromkeys(names) if name != "None"]
        return " | ".join(names + ["None"] * (NoneType in inner))
    if origin is Literal:
        return " | ".join(repr(one) for one in inner)
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        made = shown(inner[-1]) if inner and any(named_in(hint)) else ""
        return made or "Callable"
    if origin is not None:
        within = [shown(one) for one in inner if one is not Ellipsis]
        name = getattr(origin, "__name__", str(origin))
        return f"{name}[{', '.join(within)}]" if within else name
    if isinstance(hint, type):
        return hint.__name__
    return re.sub(r"\W+", "", str(hint).rpartition(".")[2]) or "Any"


def plain(value: Any) -> Any:
    """A default as a value of JSON, or as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    return getattr(value, "__name__", None) or re.sub(r" at 0x\w+", "", str(value))


def first_sentence(text: str | None) -> str:
    """Of a docstring, in one line and without its markup."""
    paragraph = inspect.cleandoc(text or "").split("\n\n")[0]
    line = " ".join(paragraph.split())
    line = re.sub(r":\w+:`~?(?:[\w.]*\.)?([^`]+?)(?: <[^>]*>)?`", r"\1", line).replace("``", "")
    # Where it says the default, which is shown beside it: but not "the default progress bar".
    line = re.sub(r"\s*(\(default\b|(?<=[.,;])\s[Dd]efaults?\b|\bDefaults?:).*$", "", line)
    line = re.sub(r"`([^`]+)`_?", r"\1", line)
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!cf)(?<!\bDr)[.](?=\s+[A-Z]|$)|:(?=$| [-*] )", line)
    return (line[: end.start()] if end else line).rstrip(",;")


def _takes_any(kind: type) -> bool:
    """Whether a class of another package hands on arguments that it does not name."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    takes = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    return takes and not kind.__module__.startswith("rotopo.")


def _counts(base: type) -> bool:
    """Whether a base may be what two classes of a kind share."""
    named = base.__name__[:1] != "_" and "Mixin" not in base.__name__
    return _is_kind(base) and named and not base.__module__.endswith(".hooks")


def _is_kind(kind: type) -> bool:
    module = kind.__module__
    ours = module.partition(".")[0] in _KINDS_OF or module.startswith(_TORCHS)
    return ours and not issubclass(kind, enum.Enum) and not is_group(kind)


def is_group(kind: type) -> bool:
    """Whether a class is a group of settings, which is given without a class path."""
    return (
        is_dataclass(kind)
        and kind.__module__.startswith("rotopo.")
        and not any(base.__module__.startswith("peft.") for base in kind.__mro__)
    )
