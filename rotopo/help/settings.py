"""From a setting's name with dots to what is described of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rotopo.described import Described, Description, Setting

# Where several classes of a kind have one name, the parser takes torch's.
_FIRST = "torch.optim."


def kinds_of(description: Description, setting: Setting) -> list[str]:
    """The kinds of classes that a setting takes, by their short names."""
    return [name for name in re.findall(r"\w+", setting.type) if name in description.kinds]


def classes_of(description: Description, setting: Setting) -> list[Described]:
    """The classes that a setting takes, without those that are only bases of others."""
    found = [one for one in map(description.of, _paths(description, setting)) if one is not None]
    parents = {base for one in found for base in one.bases}
    return [one for one in found if not _is_base(one, parents)] or found


def _is_base(one: Described, parents: set[str]) -> bool:
    ours = one.path.startswith("rotopo.")
    said = one.name.startswith("Base") or re.search("base class|interface", one.doc, re.I)
    return one.abstract or (one.path in parents and (ours or bool(said)))


def class_named(description: Description, setting: Setting, name: str) -> Described | None:
    """The class that a name or a class path means in a setting; None if none is described."""
    if "." in name:
        return description.of(name)
    named = [path for path in _paths(description, setting) if path.rpartition(".")[2] == name]
    named.sort(key=lambda path: not path.startswith(_FIRST))
    return description.of(named[0]) if named else None


def _paths(description: Description, setting: Setting) -> list[str]:
    """Of all classes that a setting takes, each once."""
    kinds = kinds_of(description, setting)
    return list(dict.fromkeys(path for kind in kinds for path in description.kinds[kind]))


def inside(description: Description, setting: Setting, named: str | None) -> dict[str, Setting]:
    """The settings that are under one: of a group its own, of a class those of the class that is
    named, or else of any that it takes.

    Args:
        description: all that is described.
        setting: the one.
        named: the class, by its name or path.
    """
    one = None if named is None else class_named(description, setting, named)
    if one is not None:
        return one.by_name
    for name in re.findall(r"\w+", setting.type):
        group = description.of(description.groups.get(name, ""))
        if group is not None:
            return group.by_name
    found: dict[str, Setting] = {}
    for path in _paths(description, setting):
        of = description.of(path)
        found |= {} if of is None else {k: v for k, v in of.by_name.items() if k not in found}
    return found


def setting_at(
    description: Description, command: str, name: str, named: Mapping[str, str]
) -> Setting | None:
    """What is described of a setting; None if nothing is.

    Args:
        description: all that is described.
        command: whose setting it is.
        name: with dots, ``model.policy.adapter``.
        named: classes by the names of their settings, as :func:`named_classes` finds them.
    """
    there, path, one = description.commands[command].by_name, "", None
    for part in name.replace(".init_args.", ".").split("."):
        path = f"{path}.{part}".removeprefix(".")
        one = there.get(part)
        if one is None:
            return None
        there = inside(description, one, named.get(path))
    return one


def named_classes(words: Sequence[str]) -> dict[str, str]:
    """What a command line gives as a single word to a setting: a class's name, perhaps."""
    found = {}
    for word, after in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found[name[2:].removesuffix(".class_path")] = value if equals else after
    return found


def type_of(setting: Setting) -> str:
    """A setting's type in the words of YAML."""
    return re.sub(r"\bNone\b", "null", setting.type).replace("'", "")


def value(it: Any) -> str:
    """A default in the words of YAML."""
    return (it or "''") if isinstance(it, str) else json.dumps(it, ensure_ascii=False)


def leaves(
    description: Description, settings: Mapping[str, Setting], prefix: str = ""
) -> Iterator[tuple[str, Setting]]:
    """Settings by their names with dots, those of groups in the group's place."""
    for name, one in settings.items():
        if one.type in description.groups:
            yield from leaves(description, inside(description, one, None), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", one
