"""What a shell may put behind a command line: commands, settings, classes, values."""

import re
from collections.abc import Iterable, Sequence

from rotopo.described import Description, Setting, read
from rotopo.errors import InputError
from rotopo.help.pages import COMMANDS
from rotopo.help.settings import classes_of, inside, named_classes, setting_at

# The shell asks for what may follow: rotopo completion words WORD ..., the last one unfinished.
# Where nothing is answered it completes files.
_SCRIPTS = {
    "bash": r"""_rotopo() {
    local IFS=$'\n' words
    words=$(rotopo completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    COMPREPLY=($words)
    [[ ${COMPREPLY[0]} == *. ]] && compopt -o nospace
}
complete -o default -F _rotopo rotopo
""",
    "zsh": r"""#compdef rotopo
_rotopo() {
    local -a found
    found=(${(f)"$(rotopo completion words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
compdef _rotopo rotopo
""",
    "fish": r"""function __rotopo
    set -l words (commandline --tokenize --cut-at-cursor --current-process)
    rotopo completion words $words[2..] (commandline --current-token --cut-at-cursor) 2>/dev/null
end
complete --command rotopo --arguments '(__rotopo)'
""",
}
_OF_RUNS = ("config", "print_config")
_OWN = ("config",)


def answer(rest: Sequence[str]) -> str:
    """A shell's script, or for such a script what may follow.

    Raises:
        InputError: a shell that there is no script for.
    """
    if rest[:1] == ["words"]:
        return "".join(f"{word}\n" for word in words(rest[1:]))
    if len(rest) != 1 or rest[0] not in _SCRIPTS:
        raise InputError(f"rotopo completion takes the name of a shell: {', '.join(_SCRIPTS)}.")
    return _SCRIPTS[rest[0]]


def words(given: Sequence[str]) -> list[str]:
    """What may stand in place of the last word.

    Args:
        given: the words behind ``rotopo``, the last one unfinished, perhaps empty.
    """
    *before, last = given or [""]
    if not before:
        return _beginning(last, [*COMMANDS, "help", "--help", "--version"])
    command, *rest = before
    if command == "help":
        return _beginning(last, COMMANDS)
    if command == "completion":
        return _beginning(last, _SCRIPTS)
    description = read()
    if command not in description.commands:
        return []
    rest = [word for word in rest if word != "="]  # bash divides --model=DPO there
    if last == "=":
        last = ""
    named = named_classes(rest)
    name, equals, value = last.partition("=")
    if equals and name.startswith("--"):
        found = _values(description, command, name[2:], value, named)
        return [f"{name}={one}" for one in found]
    if last.startswith("-"):
        return _settings(description, command, last, named)
    if rest and rest[-1].startswith("--"):
        return _values(description, command, rest[-1][2:], last, named)
    return _settings(description, command, "--", named) if not last else []


def _settings(
    description: Description, command: str, last: str, named: dict[str, str]
) -> list[str]:
    """Names of settings down to the level of the one that is begun; what has settings of its own
    ends in a dot."""
    prefix, _, _ = last[2:].rpartition(".")
    of = description.commands[command]
    if not prefix:
        ours = _OF_RUNS if "trainer" in of.by_name else _OWN
        found = [*(f"--{name}" for name in (*ours, "help")), *_each(description, of.settings, "")]
        return _beginning(last, found)
    setting = setting_at(description, command, prefix, named)
    if setting is None:
        return []
    under = inside(description, setting, named.get(prefix))
    takes_classes = bool(classes_of(description, setting))
    more = [f"--{prefix}.help"] if takes_classes or setting.type in description.groups else []
    return _beginning(last, [*_each(description, under.values(), f"{prefix}."), *more])


def _each(description: Description, settings: Iterable[Setting], prefix: str) -> list[str]:
    found = []
    for one in settings:
        name = f"--{prefix}{one.name}"
        if one.type not in description.groups:
            found.append(name)
        if one.type in description.groups or classes_of(description, one):
            found.append(f"{name}.")
    return found


def _values(
    description: Description, command: str, name: str, begun: str, named: dict[str, str]
) -> list[str]:
    setting = setting_at(description, command, name.removesuffix(".help"), named)
    if setting is None:
        return []
    classes = [one.name for one in classes_of(description, setting)]
    literals = re.findall(r"'([^']*)'", setting.type)
    truths = ["true", "false"] if re.search(r"\bbool\b", setting.type) else []
    if classes and "." in begun:
        classes = [one.path for one in classes_of(description, setting)]
    return _beginning(begun, [*classes, *literals, *truths])


def _beginning(begun: str, these: Iterable[str]) -> list[str]:
    return sorted({one for one in these if one.startswith(begun)})
