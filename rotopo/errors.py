"""The one error type for input that the user can mend, and what an error came from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def at_once() -> Iterator[Callable[..., Any]]:
    """Refuse once, with all that is wrong. Gives a function that calls another, with arguments, and
    returns None where that refuses them.

    Raises:
        InputError: at the end, whatever the calls refused.
    """
    wrong: list[str] = []

    def attempt(called: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        try:
            return called(*args, **settings)
        except SeveralErrors as error:
            wrong.extend(error.lines)
        except InputError as error:
            wrong.append(str(error))
        return None

    yield attempt
    if wrong:
        raise SeveralErrors(wrong) if len(wrong) > 1 else InputError(wrong[0])


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
