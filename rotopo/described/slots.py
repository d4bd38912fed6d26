"""What stands where while a command line is read: the classes in effect, and their settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rotopo.described import Described, Description
from rotopo.described.types import Taken, taken

SPEC = {"class_path", "init_args", "dict_kwargs"}


@dataclass
class Slot:
    """Where settings go: a class, a group or a command, with what stands in its own settings.

    Attributes:
        of: whose settings these are; None where that is in doubt.
        inside: by the names of settings that are classes or groups; the last of a list.
    """

    of: Described | None
    inside: dict[str, "Slot"] = field(default_factory=dict)


class Place(NamedTuple):
    """Where something stands.

    Attributes:
        path: of the setting, ``model.policy``.
        file: it stands in; empty of a command line.
    """

    path: str
    file: str = ""

    def at(self, line: int) -> str:
        """The words for it; none on a command line."""
        return f"{self.file}, line {line}: " if self.file else ""

    def under(self, name: str) -> "Place":
        return Place(f"{self.path}.{name}" if self.path else name, self.file)


def inner(description: Description, slot: Slot, name: str, takes: Taken) -> Slot | None:
    """What stands in a setting that has settings of its own; None where that is in doubt."""
    items = taken(takes.items, description) if takes.items else takes
    if takes.values or not (takes.nested or items.nested):
        return None
    if takes.groups and not takes.kinds and not takes.items:
        path = description.groups[takes.groups[0]]
        return slot.inside.setdefault(name, Slot(description.of(path)))
    return slot.inside.get(name)


def swapped(description: Description, old: Slot | None, of: Described | None) -> Slot:
    """A class behind another: what both share stays, see
    :func:`rotopo.parsing.keep_only_what_classes_share`."""
    if old is None or old.of is None or of is None:
        return Slot(of)
    if old.of is of:
        return old
    base = next((one for one in old.of.bases if one in of.bases), None)
    shared = description.classes.get(base or "")
    names = shared.by_name if shared is not None else {}
    return Slot(of, {key: inner for key, inner in old.inside.items() if key in names})


def paths(description: Description, slot: Slot, path: str) -> Iterator[str]:
    """All settings of what is in effect."""
    if slot.of is None:
        return
    for setting in slot.of.settings:
        name = f"{path}.{setting.name}" if path else setting.name
        yield name
        there = inner(description, slot, setting.name, taken(setting.type, description))
        if there is not None:
            yield from paths(description, there, name)
