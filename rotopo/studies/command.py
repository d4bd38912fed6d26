"""A study's command line."""

import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser

from rotopo import endings
from rotopo.errors import InputError


def run(study: Callable[..., None], name: str, description: str, args: list[str] | None) -> None:
    """Run a study with its function's arguments as options.

    Args:
        study: the function.
        name: of its module in :mod:`rotopo.studies`.
        description: what ``--help`` says first.
        args: arguments without the program's name; None reads them from the process.

    Raises:
        SystemExit: with status 2 after bad input, whose message is printed without a traceback;
            after a signal with 128 + its number.
    """
    with endings.in_one_line(instead="before its end: the same command goes on where it stopped."):
        _run(study, name, description, args)


def _run(study: Callable[..., None], name: str, description: str, args: list[str] | None) -> None:
    parser = ArgumentParser(prog=f"python -m rotopo.studies.{name}", description=description)
    parser.add_function_arguments(study)
    parsed = parser.parse_args(args)
    try:
        settings = parser.instantiate(parsed)
    except ValueError as error:  # an InputError, of which jsonargparse makes its own
        parser.error(str(error))
    try:
        study(**settings)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
