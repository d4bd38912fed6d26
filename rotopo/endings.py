"""Ctrl-C, SIGTERM and SIGHUP: a command that is asked to end says so in one line, and exits with
the status of the signal. This file imports nothing heavy, so that it holds from the beginning."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rotopo.errors import InputError, chain

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C"}
# Seconds in which signals count as one: what a terminal sends to all processes of a command, its
# shell or torchrun sends to them once more.
_AT_ONCE = 0.5
_EXIT = 30.0  # seconds that a process has to exit once it has said that it is ended
# Which process of a command it is, as whoever started it says; set before torch is imported.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


class Ended(SystemExit):
    """A signal has asked the command to end.

    Args:
        number: the signal's.

    Attributes:
        advice: what has been kept and how to go on, set by whoever knows; empty until then. It
            ends with a full stop, or with what is to be typed.
        code: the status to exit with, 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.advice = ""

    def __str__(self) -> str:
        name = _NAMES.get(self.number, signal.Signals(self.number).name)
        return f"ended by {name}" + (f" {self.advice}" if self.advice else ".")


_raised: list[Ended] = []  # since the command began


def ended(error: BaseException) -> Ended | None:
    """The end that an error came from, if it did: what is torn down by it may fail in turn, and a
    library that it has interrupted may raise an error of its own in its place."""
    found = next((one for one in chain(error) if isinstance(one, Ended)), None)
    if found is None and _raised and not isinstance(error, InputError | SystemExit):
        return _raised[-1]
    return found


def end(number: int) -> None:
    """Raise :class:`Ended`."""
    _raised.append(Ended(number))
    raise _raised[-1]


class Signals:
    """Hands the signals that ask for an end to a function; a second Ctrl-C ends the process.

    Signals that are ignored stay so: nohup ignores SIGHUP, and a shell's script the Ctrl-C that is
    not meant for what it has started in the background.

    Args:
        ask: what to call with the signal's number, wherever the main thread is.
        more: other signals to hand to it.
    """

    _last: float | None = None  # when one of them came to this process, whoever took it

    def __init__(self, ask: Callable[[int], None] = end, more: Iterable[int] = ()) -> None:
        self.ask = ask
        self.numbers = (*_SIGNALS, *more)
        self._before: dict[int, Any] = {}
        self._process = 0

    def take(self) -> None:
        """From now on; does nothing in another thread than the main one, which gets no signals."""
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        self._process = os.getpid()
        if not isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Signals):
            Signals._last = None
        for number in self.numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def give_back(self) -> None:
        """Leave the signals to whoever had them before."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            # A worker that was forked: whoever forked it ends it, by SIGTERM.
            if number != signal.SIGINT:
                _die(number)
            return
        now, last = time.monotonic(), Signals._last
        Signals._last = now
        if number == signal.SIGHUP:
            _let_go_of_terminal()
        if last is not None and now - last < _AT_ONCE:
            return
        if last is not None and number == signal.SIGINT:
            _die(number)
        self.ask(number)


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _let_go_of_terminal() -> None:
    """Let what is printed from now on go nowhere if the terminal is gone, where it would fail."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


def is_first_rank() -> bool:
    """Whether it is the process of a command that speaks for all of them."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def say(text: str) -> None:
    """Print a line of rotopo's to the terminal or the log, from a signal's handler too.

    Not by ``print``: the handler may have interrupted one.
    """
    if is_first_rank():
        begin = "\n" if os.isatty(2) else ""  # after what a progress bar has there, and the ^C
        with suppress(OSError):
            os.write(2, f"{begin}rotopo: {text}\n".encode())


def begin() -> None:
    """As :func:`in_one_line`, while a script imports what it needs."""
    Signals(_say_and_end).take()


def _say_and_end(number: int) -> None:
    stop = Ended(number)
    say(str(stop))
    raise stop


@contextmanager
def in_one_line(otherwise: str = "", instead: str = "") -> Iterator[None]:
    """Where signals end a command with one line in place of a traceback.

    Args:
        otherwise: the advice where nobody knows what has been kept.
        instead: the advice of a program that runs commands, in the place of theirs.

    Raises:
        SystemExit: with the status 128 + the signal's number.
    """
    signals = Signals()
    _raised.clear()
    signals.take()
    try:
        yield
    except BaseException as error:
        stop = ended(error)
        if stop is None:
            raise
        stop.advice = instead or stop.advice or otherwise
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        say(str(stop))
        # What a library does as the process exits may wait for what will not come, such as another
        # rank, or a thread that the signal has left without work.
        late = threading.Timer(_EXIT, os._exit, [128 + stop.number])
        late.daemon = True
        late.start()
        sys.exit(stop.code)
    finally:
        signals.give_back()
