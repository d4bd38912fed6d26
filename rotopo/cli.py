"""The ``rotopo`` command: fit, validate, test, predict and doctor, configured by YAML and class
paths; plan what a fit takes; judge, report and export what they wrote."""

import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING

from rotopo import endings, progress, threads
from rotopo.described import read
from rotopo.described.check import look_through
from rotopo.described.rephrase import InPlainWords
from rotopo.errors import InputError
from rotopo.help.command import answer
from rotopo.help.pages import COMMANDS

if TYPE_CHECKING:
    from rotopo.lightning_cli import RotopoCLI

# Commands that need no Trainer: plain functions, whose arguments are theirs.
FUNCTIONS = {
    "compare": "rotopo.compare.command.compare",
    "export": "rotopo.export.command.export",
    "judge": "rotopo.judge.command.judge",
    "report": "rotopo.report.command.report",
}
# Commands that take the options of fit beside their own.
_ON_SETTINGS = {"plan": "rotopo.plan.command.plan"}


def main(args: list[str] | None = None) -> None:
    """The console script; see :func:`run` and :func:`call`.

    Args:
        args: arguments without the program's name; None reads them from the process, which is then
            the command's own: it computes on the cores that are free.

    Raises:
        SystemExit: after bad input with status 2; after a fault with status 1, and a traceback;
            after a signal, such as Ctrl-C, with 128 + its number.
    """
    own = args is None
    args = sys.argv[1:] if args is None else args
    nothing = "before the first step: there is nothing to keep." if args[:1] == ["fit"] else ""
    with endings.in_one_line(nothing):
        _main(args, own)


def _main(args: list[str], own: bool) -> None:
    # Both before torch is imported, which takes seconds.
    try:
        page = answer(args)
    except InputError as error:
        print(f"rotopo: {error}", file=sys.stderr)
        sys.exit(2)
    if page is not None:
        print(page, end="")
        return
    wrong, foreign = look_through(args, read(), list(COMMANDS))
    for line in wrong:
        print(f"rotopo: {line}", file=sys.stderr)
    if wrong:
        sys.exit(2)
    if foreign:
        named = ", ".join(dict.fromkeys(foreign))
        print(f"rotopo: the settings of {named} are known once it is imported", file=sys.stderr)
    if own:
        threads.begin()
        progress.begin()
    from rotopo.refusals import fault

    try:
        if args[0] in FUNCTIONS | _ON_SETTINGS:
            call(args[0], args[1:])
        else:
            run(args)
    except Exception as error:
        if endings.ended(error):
            raise
        traceback.print_exception(error)
        said = fault(error)
        if said is not None:
            print(f"rotopo: {said}", file=sys.stderr)
        sys.exit(1)


def run(args: list[str] | None = None) -> "RotopoCLI":
    """As :func:`rotopo.lightning_cli.run`, which is imported when it is called for."""
    from rotopo.lightning_cli import run

    return run(args)


def call(command: str, args: list[str]) -> None:
    """Run a command that needs no Trainer.

    Args:
        command: ``export``, ``judge``, ``report`` or ``plan``.
        args: its arguments.

    Raises:
        SystemExit: with status 2 after bad input, whose message is printed without a traceback.
    """
    from jsonargparse import ArgumentParser, auto_cli

    from rotopo.refusals import in_one_line, messages

    module, _, name = (FUNCTIONS | _ON_SETTINGS)[command].rpartition(".")
    with messages(), in_one_line():
        function = getattr(import_module(module), name)
        if command in _ON_SETTINGS:
            function(args)
            return
        parser = type("Parser", (InPlainWords, ArgumentParser), {})
        auto_cli(
            function,
            args=args,
            as_positional=False,
            prog=f"rotopo {command}",
            parser_class=parser,
        )


if __name__ == "__main__":
    main()
