"""Misspelt settings, classes, files and commands, found before anything slow is imported.

It refuses what it surely knows to be wrong. Whatever is in doubt (a class of the user's, a package
of another version, a form that is seldom written) it leaves to the parser.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rotopo.described import Description
from rotopo.described.nearest import meant, nearest, nearest_file
from rotopo.described.reading import FILES, NULL, read, read_value
from rotopo.described.slots import SPEC, Place, inner
from rotopo.described.types import taken
from rotopo.described.values import Values

# Commands that take the settings of a run.
ON_SETTINGS = ("fit", "validate", "test", "predict", "doctor", "plan")
# Options that take no value, or may do without.
_BARE = ("-h", "--help", "--print_config", "--print_shtab")
_GIVES_SETTINGS = ("-c", "--config", "--ckpt_path", "--model")


class Looked(NamedTuple):
    """A command line, looked through.

    Attributes:
        wrong: what is surely wrong with it, a line each.
        foreign: class paths in it that are not described.
    """

    wrong: list[str]
    foreign: list[str]


def look_through(args: Sequence[str], description: Description, commands: Sequence[str]) -> Looked:
    """Look for mistakes in a command line.

    Args:
        args: without the program's name.
        description: what there is.
        commands: all that there are, of which those that are described are checked.
    """
    if not args or args[0][:1] == "-":
        return Looked([], [])
    command, *rest = args
    if command in description.commands and command in commands:
        check = Check(description, command)
        return Looked(check.lines(rest), check.values.foreign)
    if command in commands:
        return Looked([], [])
    if command.endswith(FILES):
        near: str | None = f"rotopo fit --config {command}"
    else:
        near = nearest(command, commands)
    first = f"did you mean {near}?" if near else "no such command"
    return Looked([f"{command}: {first}", f"the commands are {', '.join(commands)}"], [])


class Check:
    """One command line, looked through in its order.

    Args:
        description: what there is.
        command: one of its commands.
    """

    def __init__(self, description: Description, command: str) -> None:
        self.description, self.command = description, command
        self.values = Values(description, command)
        self._from_checkpoint = False  # whether settings may come from one

    def lines(self, args: Sequence[str]) -> list[str]:
        """What is wrong with the command's arguments, a line each."""
        self._from_checkpoint = any(arg.startswith("--ckpt_path") for arg in args)
        self._arguments(list(args))
        named = {arg.partition("=")[0].partition(".")[0] for arg in args if arg[:1] == "-"}
        named |= {"--config"} if any(arg.endswith(FILES) for arg in args) else set()
        asks = any(arg in _BARE or arg.partition("=")[0].endswith(".help") for arg in args)
        if self.command in ON_SETTINGS[:-1] and not asks and not named & set(_GIVES_SETTINGS):
            self._say(
                f"no settings are given: rotopo {self.command} --config FILE "
                "(configs/quickstart.yaml is one to begin with)"
            )
        if self.values.checkpoint is not None and self.command in ON_SETTINGS[:-2]:
            self._checkpoint(*self.values.checkpoint)
        return self.values.lines()

    def _say(self, line: str) -> None:
        self.values.say(line)

    def _arguments(self, args: list[str]) -> None:
        while args:
            option = args.pop(0)
            name, equals, value = option.partition("=")
            if option[:1] != "-":
                self._stray(option)
            elif name in _BARE or name.endswith(".help"):
                if name.endswith(".help") and not equals and args and args[0][:1] != "-":
                    args.pop(0)
            elif option[:2] == "-c":
                if option == "-c" and not args:
                    self._say("-c needs a file: -c FILE")
                else:
                    self._file(option[2:] or args.pop(0))
            elif option == "--" or option[:2] != "--":
                return  # seldom written
            elif equals:
                self._option(name, value)
            elif args and args[0][:2] != "--" and args[0] not in ("-c", "-h"):
                self._option(name, args.pop(0))
            else:
                self._option(name, None)

    def _stray(self, argument: str) -> None:
        if argument.endswith(FILES):
            self._say(f"{argument}: give a file of settings as --config {argument}")
        else:
            self._say(f"{argument}: belongs to no option; options are --NAME VALUE")

    def _option(self, option: str, value: str | None) -> None:
        """An option of the command line; None is one whose value is missing."""
        path = option[2:]
        if path == "config" and value is not None:
            self._file(value)
            return
        found = len(self.values.found)
        if path != "config":
            self._setting(path, value)
        if value is None and found == len(self.values.found):
            self._say(f"{option} needs a value: {option} VALUE")

    def _setting(self, path: str, value: str | None) -> None:
        names = path.removesuffix("+").split(".")
        slot, place = self.values.root, Place("")
        for at, name in enumerate(names):
            if slot.of is None:
                return
            setting = slot.of.by_name.get(name)
            if setting is None and slot is not self.values.root and name in SPEC:
                if name == "init_args":
                    continue
                return
            place = place.under(name)
            if setting is None:
                self.values.unknown(slot.of, name, place, 0)
                return
            takes = taken(setting.type, self.description)
            rest = names[at + 1 :]
            if not rest or (rest == ["class_path"] and takes.kinds):
                node = None if value is None else read_value(value)
                if path.endswith("+") and takes.items:
                    takes = taken(takes.items, self.description)
                if node is not None:
                    self.values.value(slot, name, takes, node, place)
                return
            there = inner(self.description, slot, name, takes)
            if there is None:
                if place.path == "model" and not self._from_checkpoint:
                    self._say(f"{path}: put --config FILE, or --model CLASS, in front of it")
                return
            slot = there

    def _file(self, value: str) -> None:
        node, file, wrong = read(value)
        if wrong is not None:
            self._say(wrong)
        elif node is not None and node.tag != NULL:
            self.values.settings_of_all(node, Place("", file), value)

    def _checkpoint(self, value: str, at: str) -> None:
        path = Path(value).expanduser()
        if "://" not in value and path.suffix and not path.exists():
            self._say(f"{at}ckpt_path: {value}: no such file{meant(nearest_file(value))}")
