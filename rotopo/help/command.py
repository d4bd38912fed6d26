"""Which page a command line asks for."""

import re
import sys
from collections.abc import Sequence
from importlib import metadata

from rotopo.described import Description, read
from rotopo.described.nearest import meant, nearest
from rotopo.errors import InputError
from rotopo.help import completion, lists
from rotopo.help.classes import class_page, group_page, kind_page
from rotopo.help.pages import COMMANDS, command_page, overview
from rotopo.help.settings import class_named, classes_of, kinds_of, named_classes, setting_at

_FOR_HELP = ("-h", "--help")
_WITH_VERSIONS = ("torch", "lightning", "transformers", "peft")


def answer(args: Sequence[str]) -> str | None:
    """The page that a command line asks for; None where it asks for none. A class that is not
    described is imported for its page.

    Args:
        args: the command line behind ``rotopo``.

    Raises:
        InputError: a command, a class or a completion that there is not.
    """
    command, *rest = args or _FOR_HELP
    if command == "help":
        command, rest = rest[0] if rest else _FOR_HELP[0], [_FOR_HELP[0]]
        if command not in (*COMMANDS, *_FOR_HELP):
            raise InputError(f"{command}: no such command{meant(nearest(command, COMMANDS))}")
    if command in _FOR_HELP:
        return overview()
    if command == "--version":
        return versions()
    if command not in COMMANDS:
        return None
    if command == "completion" and rest and rest[0] not in _FOR_HELP:
        return completion.answer(rest)
    if command == "completion" or any(word in _FOR_HELP for word in rest):
        return command_page(read(), command)
    if command in ("objectives", "formats", "callbacks"):
        if rest:
            raise InputError(f"rotopo {command} takes no options, and was given {rest[0]!r}.")
        return lists.formats() if command == "formats" else getattr(lists, command)(read())
    for place, word in enumerate(rest):
        asked = re.fullmatch(r"--([\w.]+)\.help(=.*)?", word)
        if asked:
            following = (asked[2] or "")[1:] or " ".join(rest[place + 1 : place + 2])
            name = "" if following.startswith("-") else following
            return _of_setting(read(), command, asked[1], name, named_classes(rest[:place]))
    return None


def _of_setting(
    description: Description, command: str, place: str, name: str, named: dict[str, str]
) -> str | None:
    """The page of a setting's class, or of the classes that it takes."""
    if command not in description.commands:
        return None
    setting = setting_at(description, command, place, named)
    if setting is None:
        return None
    if setting.type in description.groups:
        return group_page(description, place, setting)
    name = name or (setting.type.removesuffix(" | None") if place == "data" else "")
    if not name:
        return kind_page(description, command, place, setting)
    one = class_named(description, setting, name)
    if one is None and "." in name:
        print(f"{name} is not described here, and is imported for it.", file=sys.stderr)
        from rotopo.introspection import live  # imports torch and Lightning

        one = live(description).of(name)
    if one is not None:
        return class_page(description, place, setting, one)
    known = [one.name for one in classes_of(description, setting)]
    elsewhere = [
        other
        for kind in kinds_of(description, setting)
        for names in description.elsewhere.get(kind, {}).values()
        for other in names
    ]
    if name in elsewhere:
        raise InputError(f"{place}: {name} is another package's: give its whole path.")
    told = meant(nearest(name, [*known, *elsewhere]))
    raise InputError(f"{place}: there is no class {name!r}{told}")


def versions() -> str:
    """The versions of rotopo and of what it computes with."""
    found = []
    for package in ("rotopo", *_WITH_VERSIONS):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return f"{found[0]} ({', '.join(found[1:])})\n"
