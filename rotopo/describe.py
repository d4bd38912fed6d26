"""``python -m rotopo.describe``: write the description of all settings from the classes."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from lightning.pytorch.cli import SaveConfigCallback

from rotopo.cli import FUNCTIONS
from rotopo.described import (
    FILE,
    NAMED_ONLY,
    PACKAGES,
    Described,
    Description,
    to_json,
    version,
)
from rotopo.files import write_whole
from rotopo.introspection import (
    MADE,
    described,
    first_sentence,
    is_group,
    members,
    named_in,
    settings_from,
)
from rotopo.lightning_cli import RotopoCLI, RotopoTrainer, built
from rotopo.parsing import Argument, arguments, arguments_of, class_path, options
from rotopo.plan.command import own_options
from rotopo.strategies import FSDP2Strategy as FSDP2Strategy  # known by its name once imported

_PARTS_OF_RUNS = ("rotopo.run.", "rotopo.refusals.")


class _Parsers(Exception):  # noqa: N818
    """Ends a command line once its parsers are there."""


class _Asked(RotopoCLI):
    """The commands' parsers, and nothing else."""

    def init_parser(self, **kwargs: Any) -> Any:
        made = super().init_parser(**kwargs)
        self.made = [*getattr(self, "made", []), made]
        return made

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _Parsers(self.made[1:])


def generate(packages: Sequence[str] = PACKAGES) -> Description:
    """The description of what is installed.

    Args:
        packages: whose classes are described beside our own; of others their names alone.
    """
    for package in (*PACKAGES, *NAMED_ONLY):
        if version(package):
            import_module(package)
    commands, taken = _on_a_trainer()
    for name, path in FUNCTIONS.items():
        module, _, function = path.rpartition(".")
        called = getattr(import_module(module), function)
        doc = first_sentence(called.__doc__)
        commands[name] = Described(name, doc, settings_from(arguments_of(called)))
    parser = own_options()
    doc = first_sentence(parser.description)
    settings = (*commands["fit"].settings, *settings_from(options(parser)))
    commands["plan"] = Described("plan", doc, settings)

    classes: dict[str, Described] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    groups: dict[str, str] = {}
    elsewhere: dict[str, dict[str, tuple[str, ...]]] = {}
    left = [one.hint for one in taken]
    while left:
        for kind in named_in(left.pop()):
            if kind.__name__[:1] == "_" or kind.__name__ in kinds or kind.__name__ in groups:
                continue
            if is_group(kind) or kind is RotopoTrainer:
                groups[kind.__name__] = class_path(kind)
                found: dict[str, type] = {class_path(kind): kind}
            else:
                of = members(kind)
                found = {path: one for path, one in of.items() if _is_described(path, one)}
                kinds[kind.__name__] = tuple(sorted(found))
                names = _names_elsewhere(of.keys() - found.keys())
                if names:
                    elsewhere[kind.__name__] = names
            for path, one in found.items():
                if path in classes or path.partition(".")[0] not in ("rotopo", *packages):
                    continue
                own = arguments_of(one, made=issubclass(one, MADE))
                classes[path] = described(one, own)
                left += [argument.hint for argument in own]
    versions = {package: version(package) for package in PACKAGES}
    others = {package: version(package) for package in NAMED_ONLY if version(package)}
    return Description({**versions, **others}, commands, classes, kinds, groups, elsewhere)


def _on_a_trainer() -> tuple[dict[str, Described], list[Argument]]:
    """Commands that run on a Trainer, and all that they take."""
    commands, taken = {}, []
    try:
        built(_Asked, [])
    except _Parsers as stop:
        for name, parser in zip(RotopoCLI.subcommands(), stop.args[0], strict=True):
            own = list(arguments(parser))
            taken += own
            commands[name] = Described(name, first_sentence(parser.description), settings_from(own))
    return commands, taken


def _is_described(path: str, kind: type) -> bool:
    """Whether a class is ours or Lightning's or torch's, and one that a user has a reason to name:
    not a part of every run, nor one that takes a parser's result."""
    theirs = path.partition(".")[0] in ("rotopo", *PACKAGES)
    own = path.startswith(_PARTS_OF_RUNS) or issubclass(kind, SaveConfigCallback)
    return theirs and not own


def _names_elsewhere(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for path in paths:
        package, _, name = path.partition(".")
        if package in ("rotopo", *NAMED_ONLY):
            found.setdefault(package, set()).add(name.rpartition(".")[2])
    return {package: tuple(sorted(names)) for package, names in found.items()}


if __name__ == "__main__":
    write_whole(FILE, to_json(generate()))
