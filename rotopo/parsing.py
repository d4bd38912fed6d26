"""How settings are read: Lightning's parser, and the private parts of jsonargparse behind it.

Each function says why the public interface does not do. A release of jsonargparse that moves one
of the names fails in ``tests/run/test_lightning.py``, which says which; until then an upper bound
in pyproject.toml keeps such a release out.
"""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, NamedTuple

import jsonargparse._typehints as jsonargparse_typehints
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rotopo.described.rephrase import InPlainWords
from rotopo.errors import InputError


class Parser(InPlainWords, LightningArgumentParser):
    """Writes settings without validating them again: they come from its own parsing."""

    def dump(self, *args: Any, skip_validation: bool = True, **kwargs: Any) -> str:
        return super().dump(*args, skip_validation=skip_validation, **kwargs)

    def save(self, *args: Any, skip_validation: bool = True, **kwargs: Any) -> None:
        super().save(*args, skip_validation=skip_validation, **kwargs)


def refuse_ill_typed(name: str, given: Namespace) -> None:
    """Refuse what jsonargparse lets through: null for a class's argument that takes none, and a
    list for a group of settings."""
    from jsonargparse._parameter_resolvers import get_signature_parameters
    from jsonargparse._util import import_object

    arguments = given.get("init_args") or Namespace()
    for parameter in get_signature_parameters(import_object(given.class_path), None):
        annotation = parameter.annotation
        takes_null = parameter.default is None or annotation is Any or "None" in str(annotation)
        if parameter.name in arguments and arguments[parameter.name] is None and not takes_null:
            raise InputError(f"{name}.{parameter.name} is null: it has to have a value.")
        if isinstance(arguments.get(parameter.name), list) and is_dataclass(annotation):
            raise InputError(f"{name}.{parameter.name} is a list: name its settings instead.")


class Argument(NamedTuple):
    """One of a parser's.

    Attributes:
        name: with dots, ``policy.path``.
        hint: its type; of a group of settings the class, None of others that have no type.
        default: None too where there is none.
        required: whether there is none.
        doc: what its class says of it.
        is_group: whether the settings that follow under its name are a group of settings.
    """

    name: str
    hint: Any
    default: Any
    required: bool
    doc: str
    is_group: bool


def arguments(parser: LightningArgumentParser) -> Iterator[Argument]:
    """What a parser takes, help and files of settings aside: jsonargparse shows it as text alone,
    in its help."""
    for action in parser._actions:
        basetype = getattr(action, "basetype", None)  # of a group of settings
        hint = basetype or getattr(action, "_typehint", None)
        if hint is not None and not action.dest.endswith(".help"):
            default = None if action.default == "==SUPPRESS==" else action.default
            doc = "" if basetype else action.help or ""
            yield Argument(action.dest, hint, default, action.required, doc, basetype is not None)


def options(parser: argparse.ArgumentParser) -> Iterator[Argument]:
    """What a parser takes that is argparse's own."""
    for action in parser._actions:
        name = (action.option_strings or [action.dest])[-1].removeprefix("--")
        if action.dest != "help":
            doc = action.help or ""
            yield Argument(name, action.type or str, action.default, action.required, doc, False)


def arguments_of(kind: Any, made: bool = False) -> list[Argument]:
    """What a class or a function takes.

    Args:
        kind: the class or function.
        made: whether its first argument is given to it, as the parameters are to an optimiser.
    """
    parser = Parser()
    if isinstance(kind, type):
        parser.add_class_arguments(kind, skip={1} if made else None, fail_untyped=False)
    else:
        parser.add_function_arguments(kind, fail_untyped=False)
    return list(arguments(parser))


def class_paths(kind: type) -> dict[str, type]:
    """The classes of a kind that have been imported, by the paths that settings show; but for those
    that a library made as it ran, as Lightning does of an optimiser, and that no path leads to."""
    from jsonargparse._util import import_object

    found: dict[str, type] = {}
    for path in jsonargparse_typehints.get_all_subclass_paths(kind, include_abstract=True):
        with suppress(AttributeError):
            found[path] = import_object(path)
    return found


def class_path(kind: type) -> str:
    """The path that settings show of a class."""
    from jsonargparse._util import get_import_path

    return get_import_path(kind) or f"{kind.__module__}.{kind.__qualname__}"


def keep_only_what_classes_share() -> None:
    """When a class path changes, drop the settings that the old class declared itself.

    jsonargparse keeps every setting whose name and type the new class knows too, so that a DPO
    file with ``beta: 0.3`` followed by ``--model SimPO`` would build SimPO with 0.3, silently.
    Here only what a common base class declares carries over (policy, optimiser; of adapters the
    target modules). jsonargparse has no switch for this, so its function is wrapped.
    """
    original = jsonargparse_typehints.discard_init_args_on_class_path_change
    if getattr(original, "wrapped_by_rotopo", False):
        return

    def discard(parser_or_action: Any, prev_val: Any, value: Any) -> None:
        if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
            shared = _shared_settings(prev_val["class_path"], value["class_path"])
            init_args = prev_val["init_args"]
            for name in [key for key in vars(init_args) if key not in shared]:
                init_args.pop(name)
        original(parser_or_action, prev_val, value)

    discard.wrapped_by_rotopo = True  # type: ignore[attr-defined]
    jsonargparse_typehints.discard_init_args_on_class_path_change = discard


def find_classes() -> None:
    """Have a short name that torch.optim has mean torch's class, and find classes that have moved.

    bitsandbytes, which PEFT imports wherever it is installed, has optimisers of the same names, and
    jsonargparse would then ask for the full path of each. And a saved config.yaml names the file of
    a class where the user did, and keeps to it; see :func:`_in_its_room`.
    """
    original = jsonargparse_typehints.resolve_class_path_by_name
    if getattr(original, "wrapped_by_rotopo", False):
        return

    def resolve(cls: type | tuple[type], name: str) -> str:
        own = getattr(torch.optim, name, None) if "." not in name else None
        wanted = cls if isinstance(cls, tuple) else (cls,)
        if isinstance(own, type) and torch.optim.Optimizer in wanted:
            return f"torch.optim.{name}"
        return original(cls, _in_its_room(name) if name.startswith("rotopo.") else name)

    resolve.wrapped_by_rotopo = True  # type: ignore[attr-defined]
    jsonargparse_typehints.resolve_class_path_by_name = resolve


def _in_its_room(name: str) -> str:
    """A class of ours that has left its file for another: the room's name for it."""
    file, _, own = name.rpartition(".")
    room = ".".join(name.split(".")[:2])
    return name if _has(file, own) or not _has(room, own) else f"{room}.{own}"


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(module), name)
    except ModuleNotFoundError:
        return False


def _shared_settings(old_path: str, new_path: str) -> set[str]:
    """Names of the arguments that the nearest common base of two classes takes."""
    from jsonargparse._parameter_resolvers import get_signature_parameters
    from jsonargparse._util import import_object
    from peft import PeftConfig  # slow to import, and most runs swap no class

    old, new = import_object(old_path), import_object(new_path)
    if issubclass(old, PeftConfig) and issubclass(new, PeftConfig):
        return {"target_modules"}
    bases = [base for base in old.__mro__[1:] if base in new.__mro__[1:] and base is not object]
    return {p.name for p in get_signature_parameters(bases[0], None)} if bases else set()
