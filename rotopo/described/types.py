"""The types of settings, read from the text that is shown of them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from rotopo.described import Description

_SEVERAL = ("list", "Iterable", "Sequence", "tuple", "set")
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "y", "n")
_NUMBERS = ("inf", "nan")


@dataclass(frozen=True)
class Taken:
    """What a setting takes.

    Attributes:
        kinds: of classes by class path.
        groups: of settings.
        items: the type of a list's items; empty where it takes no list.
        values: of a mapping's values.
        plain: names of other types.
        words: texts that it may be; numbers too, as texts.
    """

    kinds: tuple[str, ...]
    groups: tuple[str, ...]
    items: str
    values: str
    plain: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def nested(self) -> bool:
        """Whether there are settings inside it."""
        return bool(self.kinds or self.groups)

    def is_truth(self, text: str) -> bool:
        """Whether a text says true or false, and may."""
        return "bool" in self.plain and text.lower() in _TRUTHS

    def refuses(self, text: str) -> bool:
        """Whether a text on a line is surely no value: where numbers are wanted that has not one
        digit, and where words are none of them."""
        known = {"int", "float", "bool", "None"}
        if self.nested or self.items or self.values or set(self.plain) - known:
            return False
        if text.lower() in ("null", "~", ""):
            return False
        if text in self.words or self.is_truth(text):
            return False
        number = {"int", "float"} & set(self.plain)
        is_number = any(c.isdigit() for c in text) or text.lower().strip(".-+") in _NUMBERS
        return not (is_number and (number or "bool" in self.plain))


@cache
def taken(shown: str, description: Description) -> Taken:
    """What a type takes.

    Args:
        shown: as :class:`rotopo.described.Setting` has it.
        description: knows what is a kind and what a group.
    """
    found: dict[str, list[str]] = {
        name: [] for name in ("kinds", "groups", "items", "values", "plain", "words")
    }
    for part in _parts(ast.parse(shown, mode="eval").body):
        if isinstance(part, ast.Constant):
            found["plain" if part.value is None else "words"].append(str(part.value))
        elif isinstance(part, ast.Subscript):
            name = ast.unparse(part.value)
            inner = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            found["plain"].append(name)
            if name in _SEVERAL:
                found["items"] += map(ast.unparse, inner)
            elif name == "dict":
                found["values"].append(ast.unparse(inner[-1]))
        else:
            name = ast.unparse(part)
            kind = "kinds" if name in description.kinds else "plain"
            found["groups" if name in description.groups else kind].append(name)
    joined = {name: " | ".join(found.pop(name)) for name in ("items", "values")}
    return Taken(**{name: tuple(texts) for name, texts in found.items()}, **joined)  # type: ignore[arg-type]


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from _parts(node.left)
        yield from _parts(node.right)
    else:
        yield node
