"""What other packages say about settings, in one line; a fault of ours keeps its traceback.

Lightning, jsonargparse, transformers, PEFT and whatever a class path names refuse a setting with
an exception of any type. An exception is such a refusal by where it was raised:

- in a constructor of a class that the settings name, below which no code of ours and none of the
  user's was called (:class:`Building`);
- else on purpose, by a ``raise`` in a library's own code, before the first batch; where our code
  called the library, only by the libraries whose words are about settings (:func:`refusal`).

Everything else passes: what our own code raises, what happens in a step, and whatever goes wrong
in a class of the user's own.
"""

import dis
import errno
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from jsonargparse import Namespace

from rotopo.errors import InputError, SeveralErrors, input_error
from rotopo.files import full_disk

_OURS = str(Path(__file__).parent)
_STANDARD = sysconfig.get_paths()["stdlib"]
# Frames that stand above everything: they have called nothing with values of their own.
_ENTRY = tuple(
    str(Path(__file__).with_name(name))
    for name in ("cli.py", "lightning_cli.py", "load.py", "parsing.py", "refusals.py")
)
# What these raise on purpose is about what they were given, which our code hands through.
_ON_SETTINGS = ("lightning", "jsonargparse", "transformers", "peft", "huggingface_hub")
# What a message of these types says makes no sense without the type.
_BARE = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class Building:
    """Builds what a class path names, for jsonargparse; keeps what went wrong.

    jsonargparse tries a value as each type that a setting may have, and of what the class said it
    reports the beginning, or something else.

    Args:
        settings: of the command, to find out which of them names a class.
    """

    def __init__(self, settings: Namespace) -> None:
        self.settings = settings
        self.failure: Exception | None = None

    def __call__(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        try:
            built, self.failure = kind(*args, **kwargs), None
            return built
        except Exception as error:
            place = setting_of(kind, self.settings) or kind.__name__
            refused = None if input_error(error) else _refused_below(error, place, 0)
            self.failure = refused or error
            if refused is None:
                raise
            raise refused from error


@contextmanager
def naming(place: str, on_purpose: bool = True) -> Iterator[None]:
    """Where a library works with what the settings gave it, and calls nothing of ours or of the
    user's.

    Args:
        place: names the settings.
        on_purpose: whether the library has to say ``raise``; else it may stumble, too.

    Raises:
        InputError: in place of the library's exception.
    """
    try:
        yield
    except Exception as error:
        refused = None if input_error(error) else _refused_below(error, place, 1, on_purpose)
        if refused is None:
            raise
        raise refused from error


@contextmanager
def messages() -> Iterator[None]:
    """Bad input ends with its message."""
    try:
        yield
    except ValueError as error:
        cause = input_error(error)
        if cause is None:
            raise
        for said in cause.lines if isinstance(cause, SeveralErrors) else [cause]:
            print(f"rotopo: {said}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def in_one_line(
    settings: Callable[[], Namespace | None] = lambda: None,
    began: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Turns a refusal by another package into bad input.

    Args:
        settings: of the command, once they are known.
        began: whether a batch has been computed.

    Raises:
        InputError: in its place.
    """
    try:
        yield
    except Exception as error:
        refused = input_error(error) or refusal(unwrapped(error), settings(), began())
        if refused is None or refused is error:
            raise
        raise refused from error


def refusal(error: Exception, settings: Namespace | None, began: bool) -> InputError | None:
    """An error as bad input, where it is another package's word about a setting; else None.

    Args:
        error: whatever was raised.
        settings: of the command, if they are known.
        began: whether a batch has been computed.
    """
    if full_disk(error):  # which has a message of its own
        return None
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
        return InputError(f"{error.filename or 'a file'} cannot be used: {error.strerror}.")
    if type(error).__module__.startswith(("torch._inductor.exc", "torch._dynamo.exc")):
        return InputError(
            "policy.compile (of a reward model, backbone.compile) and the attention flex_attention "
            f"take a compiler that works, and torch's did not: {line(error)} (Set compile to "
            "false; or, if a run was killed while it compiled, remove torch's cache of compiled "
            "code, /tmp/torchinductor_USER, where half a file may be.)"
        )
    *callers, last = _frames(error)
    speaker = type(last.tb_frame.f_locals.get("self"))
    place = setting_of(speaker, settings) or _named(_package(last))
    if isinstance(error, ImportError):
        if began or _whose(last) == "ours":
            return None
        where = f"{_file(last)}, line {last.tb_lineno}" if _whose(last) == "user" else place
        return InputError(f"{where}: {line(error)}")
    if _whose(last) != "library" or not (_raises(last) or isinstance(error, OSError)):
        return None
    between = {_whose(frame) for frame in callers if _file(frame) not in _ENTRY}
    if "user" in between:
        return None
    if "ours" in between and _package(last) not in _ON_SETTINGS:
        return None
    # A callback of Lightning's looks for the metric that it monitors when it is due.
    callback = _if_imported("lightning.pytorch", "Callback")
    due = callback is not None and issubclass(speaker, callback) and "ours" not in between
    if began and not due:
        return None
    said = f"{place}: {line(error)}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        said = f"{error.filename} cannot be used: {error.strerror}."
    return InputError(said)


def unwrapped(error: Exception) -> Exception:
    """What a class of the settings raised when it was built, instead of what jsonargparse makes of
    it."""
    while isinstance(error.__cause__, Exception) and _package(_frames(error)[-1]) == "jsonargparse":
        error = error.__cause__
    return error


def refuse_repeated_names(file: Path) -> None:
    """Refuse a YAML file that gives a setting twice, of which only the last would count.

    Raises:
        InputError: names the setting and its line.
    """
    nodes = [yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            names = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in names:
                    raise InputError(
                        f"{file}, line {key.start_mark.line + 1}: {key.value!r} is there already, "
                        "and only the last would count: leave one of them out."
                    )
                if isinstance(key, yaml.ScalarNode):
                    names.add(key.value)
                nodes.append(value)


def fault(error: BaseException) -> str | None:
    """What to print after the traceback of an error that is nobody's setting; None where it came
    from the user's own code."""
    out_of_memory = _if_imported("torch", "OutOfMemoryError") or MemoryError
    if isinstance(error, MemoryError | out_of_memory):
        return (
            "out of memory: a lower data.token_budget, model.policy.activation_checkpointing or a "
            "model divided among GPUs (configs/strategies) needs less."
        )
    ours = [_whose(frame) for frame in _frames(error) if _whose(frame) != "library"]
    if ours and ours[-1] == "user":
        return None
    return (
        "this is a fault of rotopo's, not of your settings: please report it to the maintainers "
        "of rotopo, with the lines above."
    )


def _if_imported(module: str, name: str) -> type | None:
    """A class of a package that is slow to import, if anybody has: else nothing is of that class,
    and the commands that do without the package need not wait for it."""
    return getattr(sys.modules.get(module), name, None)


def setting_of(kind: type, settings: Namespace | None) -> str | None:
    """Which setting names a class, and the class: ``trainer.logger (WandbLogger)``; None if none
    does."""
    for path, value in vars(settings or Namespace()).items():
        found = _place_of(kind, path, value)
        if found:
            return f"{found} ({kind.__name__})"
    return None


def _place_of(kind: type, path: str, value: Any) -> str | None:
    if isinstance(value, Namespace):
        named = str(value.get("class_path", "")).rpartition(".")[2]
        if named == kind.__name__:
            return path
        places = [
            (path if name == "init_args" else f"{path}.{name}", inner)
            for name, inner in vars(value).items()
        ]
    elif isinstance(value, list):
        places = [(path, inner) for inner in value]
    else:
        return None
    found = (_place_of(kind, *place) for place in places)
    return next((place for place in found if place), None)


def line(error: BaseException) -> str:
    """What an error says, in one line: of several paragraphs the first."""
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    kind = type(error).__name__
    if not text:
        return kind
    return f"{kind}: {text}" if isinstance(error, _BARE) else text


def _refused_below(
    error: Exception, place: str, caller: int, on_purpose: bool = False
) -> InputError | None:
    """An error of a library's that has called nothing but libraries, as bad input; else None.

    Args:
        error: the error.
        place: what to name.
        caller: how many frames of ours called the library.
        on_purpose: whether the library has to have raised it on purpose.
    """
    below = [frame for frame in _frames(error) if _file(frame) != __file__][caller:]
    if any(_whose(frame) != "library" for frame in below):
        return None
    if on_purpose and not (below and _raises(below[-1])):
        return None
    return InputError(f"{place}: {line(error)}")


def _frames(error: BaseException) -> list[TracebackType]:
    """Where an error passed, the outermost first, without the machinery of imports."""
    found, at = [], error.__traceback__
    while at is not None:
        if not _file(at).startswith("<frozen importlib"):
            found.append(at)
        at = at.tb_next
    return found


def _file(frame: TracebackType) -> str:
    return frame.tb_frame.f_code.co_filename


def _whose(frame: TracebackType) -> str:
    """``ours``, a ``library``'s, or the ``user``'s: code that is not installed."""
    file = Path(_file(frame))
    if file.is_relative_to(_OURS):
        return "ours"
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    # Code without a file is what dataclasses and decorators generate.
    return (
        "library" if installed or file.is_relative_to(_STANDARD) or str(file)[0] == "<" else "user"
    )


def _package(frame: TracebackType) -> str:
    return str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _named(package: str) -> str:
    return "trainer" if package == "lightning" else package


def _raises(frame: TracebackType) -> bool:
    """Whether the code says ``raise`` there; else it stumbled."""
    return dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"
