"""The one error type for input that the user can mend, and what an error came from."""

from collections.abc import Iterator, Sequence


class InputError(ValueError):
    """Bad input: a row, a file or a setting.

    The message names the place and says what to do. The command line prints it alone,
    without a traceback, and exits with status 2.
    """


class SeveralErrors(InputError):  # noqa: N818
    """Several at once, which the command line prints on a line each.

    Attributes:
        lines: what each of them says.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from; each once, although they may come from one another."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def input_error(error: BaseException) -> InputError | None:
    """The bad input that an error came from: jsonargparse wraps what a class raises when it is
    built."""
    return next((e for e in chain(error) if isinstance(e, InputError)), None)
