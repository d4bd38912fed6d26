"""The values of settings, in files and on a command line, held against what is described."""

from pathlib import Path
from typing import NamedTuple

import yaml

from rotopo.described import Described, Description
from rotopo.described.nearest import meant, nearest
from rotopo.described.reading import FILES, NULL, entries
from rotopo.described.slots import SPEC, Place, Slot, inner, paths, swapped
from rotopo.described.source import is_nowhere
from rotopo.described.types import Taken, taken

_EXPECTED = {"int": "an int", "float": "a float", "bool": "true or false"}
_MOST = 15  # names that a message lists


class Unknown(NamedTuple):
    """A name that a class does not know; what may be meant is known at the end."""

    place: Place
    line: int
    of: Described
    name: str


class NoClass(NamedTuple):
    """A short name of no class: in doubt where another class brings its own along."""

    said: str


class Values:
    """What is wrong with the values of settings, in the order in which they are given.

    Attributes:
        root: the command, with the classes in effect in its settings.
        found: what is wrong.
        checkpoint: the last one named, and where.
        foreign: class paths that are not described, and may bring further short names along.
    """

    def __init__(self, description: Description, command: str) -> None:
        self.description, self.command = description, command
        self.root = Slot(description.commands[command])
        self.found: list[str | Unknown | NoClass] = []
        self.checkpoint: tuple[str, str] | None = None
        self.foreign: list[str] = []

    def lines(self) -> list[str]:
        """All that is wrong, a line each."""
        said = []
        for one in self.found:
            if isinstance(one, Unknown):
                said.append(f"{one.place.at(one.line)}{one.place.path}: {self._words(one)}")
            elif isinstance(one, str):
                said.append(one)
            elif not self.foreign:
                said.append(one.said)
        return list(dict.fromkeys(said))

    def say(self, line: str) -> None:
        """Something is wrong."""
        self.found.append(line)

    def unknown(self, of: Described, name: str, place: Place, line: int) -> None:
        """A name that a class does not know."""
        if not of.open:
            self.found.append(Unknown(place, line, of, name))

    def settings_of_all(self, node: yaml.Node, place: Place, name: str) -> None:
        """A file of settings."""
        if isinstance(node, yaml.MappingNode):
            self._settings(self.root, node, place)
        else:
            self.say(f"{name}: holds no settings by their names")

    def _settings(self, slot: Slot, node: yaml.MappingNode, place: Place) -> None:
        seen = set()
        for key, value in entries(node):
            if slot.of is None:
                return
            if not isinstance(key, yaml.ScalarNode) or key.value[:1] in ("$", "_"):
                continue
            name, line = key.value, key.start_mark.line + 1
            if name in seen and place.file:
                self.say(
                    f"{place.file}, line {line}: {name!r} is there already, and only the last "
                    "would count: leave one of them out"
                )
            seen.add(name)
            setting = slot.of.by_name.get(name)
            if setting is not None:
                takes = taken(setting.type, self.description)
                self.value(slot, name, takes, value, place.under(name))
            elif "." in name:  # a path of names, which is seldom written
                slot.inside[name.partition(".")[0]] = Slot(None)
            elif slot is not self.root or name not in ("config", "print_config"):
                self.unknown(slot.of, name, place.under(name), line)

    def value(self, slot: Slot, name: str, takes: Taken, node: yaml.Node, place: Place) -> None:
        """A value of a setting.

        Args:
            slot: what the setting belongs to.
            name: the setting's.
            takes: what it takes.
            node: the value.
            place: the setting's.
        """
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            self._fields_of(slot, name, takes, node, place)
        elif isinstance(node, yaml.SequenceNode) and takes.items:
            items = taken(takes.items, self.description)
            for one in node.value:
                slot.inside.pop(name, None)  # each of its own
                self.value(slot, name, items, one, place)
        elif isinstance(node, yaml.ScalarNode):
            null = node.tag == NULL
            if slot is self.root and name == "ckpt_path":
                self.checkpoint = None if null else (node.value, place.at(line))
            if null:
                slot.inside[name] = Slot(None)
            elif takes.nested:
                self._word(slot, name, takes, node, place)
            elif takes.refuses(node.value):
                self._refused(takes, node.value, place, line)

    def _fields_of(
        self, slot: Slot, name: str, takes: Taken, node: yaml.MappingNode, place: Place
    ) -> None:
        by_name = {
            key.value: (key, value)
            for key, value in entries(node)
            if isinstance(key, yaml.ScalarNode)
        }
        if takes.items and not takes.nested:
            takes = taken(takes.items, self.description)
        _, given = by_name.get("init_args", (None, None))
        if takes.kinds:
            _, named = by_name.get("class_path", (None, None))
            if isinstance(named, yaml.ScalarNode):
                self._word(slot, name, takes, named, place, is_path=True)
            there = slot.inside.get(name)
            if there is None or there.of is None:
                return
            if not SPEC & by_name.keys():
                self._settings(there, node, place)
                return
            for key, (at, _) in by_name.items():
                if key not in SPEC and key[:1] not in ("$", "_"):
                    self.say(
                        f"{place.at(at.start_mark.line + 1)}{place.path}.{key}: settings of a "
                        "class go under init_args, beside its class_path"
                    )
            if isinstance(given, yaml.MappingNode):
                self._settings(there, given, place)
        elif takes.groups and not takes.values:
            group = self.description.of(self.description.groups[takes.groups[0]])
            there = inner(self.description, slot, name, takes) or Slot(group)
            if "class_path" not in by_name:
                self._settings(there, node, place)
            elif isinstance(given, yaml.MappingNode):
                self._settings(there, given, place)
        elif takes.values:
            each = taken(takes.values, self.description)
            for key, (_, value) in by_name.items():
                if each.nested and isinstance(value, yaml.MappingNode):
                    self.value(Slot(None), name, each, value, place.under(key))

    def _word(
        self,
        slot: Slot,
        name: str,
        takes: Taken,
        node: yaml.ScalarNode,
        place: Place,
        is_path: bool = False,
    ) -> None:
        """A text in place of a class or a group: a class path, a file, or another word."""
        text = node.value
        names = all(part.isidentifier() for part in text.split("."))
        of = None
        if takes.kinds and names and not text.endswith(FILES) and not takes.is_truth(text):
            of = self._class(takes, text, place, node.start_mark.line + 1, is_path)
        slot.inside[name] = swapped(self.description, slot.inside.get(name), of)

    def _class(
        self, takes: Taken, text: str, place: Place, line: int, is_path: bool
    ) -> Described | None:
        """The class that a text names; None where that is in doubt, or wrong."""
        known = self.description
        if "." in text:
            found = known.of(text)
            if found is None and text.partition(".")[0] not in ("rotopo", *known.versions):
                self.foreign.append(text)
            elif found is None and is_nowhere(text):
                self._no_class(takes, text, place, line)
            return found
        paths = [path for kind in takes.kinds for path in known.kinds[kind]]
        named = [path for path in paths if path.rpartition(".")[2] == text]
        if named:  # torch's before ours, see rotopo.parsing.find_classes
            return known.of(max(named, key=lambda path: path.startswith("torch.")))
        elsewhere = [known.elsewhere.get(kind, {}) for kind in takes.kinds]
        packages = {path.partition(".")[0] for path in paths}.union(*elsewhere)
        others = {name for by in elsewhere for names in by.values() for name in names}
        a_word = "str" in takes.plain and not is_path
        if not (text in others or packages & known.changed or a_word or Path(text).exists()):
            self._no_class(takes, text, place, line)
        return None

    def _no_class(self, takes: Taken, text: str, place: Place, line: int) -> None:
        known = self.description
        paths = sorted({path for kind in takes.kinds for path in known.kinds[kind]})
        short = {
            path.rpartition(".")[2]: path
            for path in paths
            if path not in known.classes or not known.classes[path].abstract
        }
        near = nearest(text.rpartition(".")[2], short)
        if near is not None and "." in text:
            near = short[near]
        said = f"{place.at(line)}{place.path}: there is no {' or '.join(takes.kinds)} {text!r}"
        if near is None:
            said += f"; there are {', '.join(sorted(short))}"
        self.found.append(NoClass(said + meant(near and repr(near))))

    def _refused(self, takes: Taken, text: str, place: Place, line: int) -> None:
        expected = [_EXPECTED[kind] for kind in takes.plain if kind in _EXPECTED]
        expected += [repr(word) for word in takes.words]
        near = nearest(text, takes.words)
        self.say(
            f"{place.at(line)}{place.path}: expected {' or '.join(expected)}, found {text!r}"
            f"{meant(near and repr(near))}"
        )

    def _words(self, one: Unknown) -> str:
        whose = one.of.name.removeprefix("Rotopo")
        whose = "the Trainer" if whose == "Trainer" else whose
        said = f"{whose} has no setting {one.name!r}"
        everywhere = paths(self.description, self.root, "")
        elsewhere = [path for path in everywhere if path.rpartition(".")[2] == one.name]
        near = nearest(one.name, one.of.by_name)
        if len(elsewhere) == 1 or (elsewhere and near is None):
            return said + meant(" or ".join(map(repr, elsewhere[:3])))
        if near is not None:
            return said + meant(repr(near))
        names = list(one.of.by_name)
        return f"{said}; it has {', '.join(names)}" if 0 < len(names) <= _MOST else said
