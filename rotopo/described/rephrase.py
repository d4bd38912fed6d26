"""What jsonargparse says of a setting, which is a page, in one line and in plain words."""

import re
from typing import Any, NoReturn

from rotopo.errors import InputError

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_EXPECTED = re.compile(r"Expected an? (<class '[^']+'>|.*?)(?:\. Got value: (.*))?$", re.M)
_GIVEN = re.compile(r"Given value: (.*)$", re.M)
_NESTED = re.compile(r"NestedArg\(key='[^']*', val=(.*)\)$")


class InPlainWords:
    """Of a parser: it says what is wrong in one line, and takes names in full alone."""

    exit_on_error: bool

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)  # type: ignore[call-arg]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse, in place of a page with the usage above.

        Raises:
            InputError: says what is wrong.
        """
        if not self.exit_on_error:  # it is asked by another parser, which goes on from there
            super().error(message, ex)  # type: ignore[misc]
        raise InputError(rephrased(message)) from ex


def rephrased(message: str) -> str:
    """The line for a message.

    Args:
        message: of jsonargparse or argparse.
    """
    path = ".".join(_KEY.findall(message))
    prefix = f"{path}: " if path and path != "config" else ""
    option = _OPTION.search(message)
    if option is not None:
        classes = _CLASS.findall(message[: option.start()])
        whose = classes[-1][0].rpartition(".")[2] if classes else path.rpartition(".")[2]
        name = option.group(1)
        return f"{path}.{name}: {whose} has no setting {name!r}"
    deepest = message.partition("Given value type")[0]
    expected = [(kind, got) for kind, got in _EXPECTED.findall(deepest)]
    named = [(path, said) for path, said in _CLASS.findall(message) if said]
    said = [(path, line) for path, line in named if not line.startswith("Parser key")]
    if said:
        return f"{prefix}{said[0][0]}: {said[0][1]}"
    exact = [one for one in expected if one[1]]
    kinds = list(dict.fromkeys(_kind(kind) for kind, _ in exact or expected))
    given = _GIVEN.search(message)
    value = exact[0][1] if exact else _value(given.group(1)) if given else ""
    no_class = re.search(r"Expected a dot import path string: (\S+)", message)
    if no_class is not None:
        return f"{prefix}there is no class {no_class.group(1)!r}"
    if kinds and (exact or given is not None):
        return f"{prefix}expected {' or '.join(kinds)}, found {_quoted(value)}"
    text = " ".join(_KEY.sub("", message).strip(": \n").split())
    text = re.sub(r"the following arguments are required: (.*)", r"\1: missing", text)
    return f"{prefix}{text}"


def _kind(text: str) -> str:
    names = re.sub(r"<class '([^']+)'>", r"\1", text)
    if names.startswith("typing.Literal["):
        return names.removeprefix("typing.Literal[").removesuffix("]").replace(", ", " or ")
    names = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", names)
    if names == "NoneType":
        return "null"
    return f"{'an' if names[:1].lower() in 'aeio' else 'a'} {names}"


def _value(text: str) -> str:
    nested = _NESTED.search(text)
    return nested.group(1) if nested else text


def _quoted(value: str) -> str:
    return value if value.startswith(("'", '"', "[", "{", "(")) else repr(value)
