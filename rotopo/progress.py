"""How far something long is: in a terminal one line that is written over, in a log plain lines.

A loop says so with ``for item in Progress(items, "Scoring"): ...``; :class:`Screen` is what draws.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sized
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

OFTEN = 0.2  # seconds between two pictures of a terminal's line
EVERY = 10.0  # seconds between two lines of a log at least
_SELDOM = 300.0  # and at most, of a loop


class Part(NamedTuple):
    """A part of a line.

    Attributes:
        text: what it says.
        rank: how readily it goes where the line is too long: the highest goes first.
    """

    text: str
    rank: int = 0


def fitted(parts: Iterable[Part], columns: int | None) -> str:
    """The parts in their order, without those that there is no room for.

    Args:
        parts: with rank 0 they stay, and are cut where even they are too long.
        columns: characters at most; None for no limit.
    """
    left = [part for part in parts if part.text]
    while True:
        text = "  ".join(part.text for part in left)
        most = max((part.rank for part in left), default=0)
        if columns is None or len(text) <= columns:
            return text
        if most == 0:
            return text[:columns]
        left.remove(next(part for part in reversed(left) if part.rank == most))


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any: 0:05, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def between(whole: float, most: float) -> float:
    """Seconds from one line of a log to the next: some five lines for all of it, where that is not
    too often or too seldom.

    Args:
        whole: seconds that all of it takes.
        most: seconds.
    """
    return min(max(EVERY, whole / 5), most)


class Screen:
    """Where progress is shown: standard error, whatever that is at the moment.

    In a terminal there is one line for all. Whatever else is printed takes it off first, so that
    no two texts are on one line; it comes back with the next picture.
    """

    def __init__(self) -> None:
        self.drawn = False
        # By name; kept, since print() of Python 3.11 holds no reference to the stream it writes to.
        self._watched: dict[str, _Watched] = {}

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be written over."""
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def columns(self) -> int:
        """That can be written to without a new line."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):  # no terminal of its own
            columns = 0
        return (columns or 80) - 1  # a full line would put the cursor on the next

    def draw(self, parts: Iterable[Part]) -> None:
        """Write a terminal's line over."""
        text = fitted(parts, self.columns)
        self.erase()
        sys.stderr.write(text)
        sys.stderr.flush()
        self.drawn = True
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if not isinstance(stream, _Watched):
                if name not in self._watched or self._watched[name].stream is not stream:
                    self._watched[name] = _Watched(stream, self)
                setattr(sys, name, self._watched[name])

    def keep(self, parts: Iterable[Part]) -> None:
        """Write a line that stays."""
        text = fitted(parts, self.columns if self.is_terminal else None)
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take a terminal's line off, and watch nobody any more."""
        self.erase()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, _Watched):
                setattr(sys, name, stream.stream)

    def erase(self) -> None:
        """Take a terminal's line off."""
        if self.drawn:
            self.drawn = False
            sys.stderr.write("\r\x1b[K")  # erases up to the end of the line
            sys.stderr.flush()


class _Watched:
    """A stream that takes the line off before something is written to it."""

    def __init__(self, stream: Any, screen: Screen) -> None:
        self.stream = stream
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.erase()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


screen = Screen()


def begin(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where there is no terminal, leave out the bars of others, which a log would have as one
    endless line (transformers', of a GGUF file's tensors). ``TQDM_DISABLE=0`` brings them back.

    To be called by a program, not by a library, and before others are imported: tqdm reads its
    settings once.
    """
    if not screen.is_terminal:
        environment.setdefault("TQDM_DISABLE", "1")


class Progress(Generic[T]):
    """A loop that says how far it is.

    In a terminal its line goes when the loop is over. In a log it says nothing of what takes less
    than ten seconds; else there is a line after the first item, some five more, and a last.

    Args:
        items: of the loop; None for one that calls :meth:`update` itself.
        title: what is done.
        total: how many items there are; None asks ``items``.
        hidden: show nothing: on all ranks but one.
        clock: seconds.
    """

    def __init__(
        self,
        items: Iterable[T] = (),
        title: str = "",
        total: int | None = None,
        hidden: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.items = items
        self.title = title
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.hidden = hidden
        self.clock = clock
        self.n = 0
        self.about = ""
        self.said = 0  # items, in the last line of a log
        self.began = self.last = clock()
        if not hidden and screen.is_terminal:
            screen.draw(self._parts())

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, n: int = 1, about: str | None = None) -> None:
        """Note that more items are done.

        Args:
            n: how many.
            about: what is done now, behind the title; None leaves it as it is.
        """
        first, self.n = self.n == 0, self.n + n
        self.about = self.about if about is None else about
        if self.hidden:
            return
        now = self.clock()
        if screen.is_terminal:
            if now - self.last >= OFTEN:
                self.last = now
                screen.draw(self._parts())
        elif now - self.last >= between(now - self.began + self._left(), _SELDOM) or (
            first and self._left() > EVERY
        ):
            self._say(now)

    def close(self) -> None:
        """Say that the loop is over, where it has said anything."""
        if self.hidden:
            return
        self.hidden = True
        if screen.is_terminal:
            screen.clear()
        elif 0 < self.said < self.n:
            self._say(self.clock())

    def _say(self, now: float) -> None:
        self.last, self.said = now, self.n
        screen.keep(self._parts())

    def _left(self) -> float:
        """Seconds that are left to come, by those that have gone; 0 where nobody knows."""
        if not self.n or self.total is None:
            return 0.0
        return (self.clock() - self.began) / self.n * max(0, self.total - self.n)

    def _parts(self) -> list[Part]:
        count = f"{self.n}" if self.total is None else f"{self.n}/{self.total}"
        over = self.total is not None and self.n >= self.total
        if self.n and not over and self.total is not None:
            time_part = f"{duration(self._left())} left"
        else:
            time_part = f"in {duration(self.clock() - self.began)}" if self.n else ""
        return [Part(self.title), Part(count), Part(self.about, 2), Part(time_part, 1)]
