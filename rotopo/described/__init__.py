"""What there is to set, read from a file: commands, classes and their settings.

The file is generated from the classes themselves by ``python -m rotopo.describe``. Reading it
imports neither torch nor jsonargparse nor any class that it describes, so that help and messages
about misspelt settings need not wait for them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("described.json")
# Whose classes and settings are described; those of others are known by their names at most.
PACKAGES = ("lightning", "peft", "torch")
# Whose classes have short names, too, once something has imported them.
NAMED_ONLY = ("bitsandbytes",)


@dataclass(frozen=True)
class Setting:
    """One setting of a class or a command.

    Attributes:
        name: without those of the settings that it is under.
        type: as it is shown, ``float | None``. A name in it that is a :attr:`Described.kinds` is a
            class path with settings of its own, and one of :attr:`Described.groups` a group.
        default: a value of JSON; what is none, as text. None too where there is no default.
        required: whether there is no default.
        doc: the first sentence of what is said of it; empty where nothing is.
    """

    name: str
    type: str
    default: Any = None
    required: bool = False
    doc: str = ""


@dataclass(frozen=True)
class Described:
    """A class, a group of settings, or a command.

    Attributes:
        path: the class path by which it is shown; of a command its name.
        doc: the first sentence of its docstring.
        settings: in the order of its arguments.
        defined: where its code is, where that is another path.
        bases: class paths of what it inherits from, the nearest first.
        abstract: whether it is only a base of others.
        open: whether it may take settings that are not listed.
    """

    path: str
    doc: str
    settings: tuple[Setting, ...]
    defined: str = ""
    bases: tuple[str, ...] = ()
    abstract: bool = False
    open: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @cached_property
    def by_name(self) -> dict[str, Setting]:
        return {one.name: one for one in self.settings}


@dataclass(frozen=True, eq=False)
class Description:
    """All that is described.

    Attributes:
        versions: of the packages that it was generated from.
        commands: by their names.
        classes: by their class paths, groups among them.
        kinds: class paths by the short name of what they all are: Callback, Optimizer, ...
        groups: class paths of groups of settings by their short names: PolicyConfig, Trainer, ...
        elsewhere: other packages' classes, short names by kind and package.
    """

    versions: Mapping[str, str]
    commands: Mapping[str, Described]
    classes: Mapping[str, Described]
    kinds: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, str]
    elsewhere: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    @cached_property
    def changed(self) -> set[str]:
        """Packages whose installed version is another."""
        return {package for package, there in self.versions.items() if version(package) != there}

    @cached_property
    def _by_path(self) -> dict[str, Described]:
        return {one.defined: one for one in self.classes.values() if one.defined} | dict(
            self.classes
        )

    def of(self, path: str) -> Described | None:
        """What a class path names; None of what is not described, or whose settings, or those that
        it inherits, are another version's."""
        found = self._by_path.get(path)
        if found is None:
            return None
        bases = (base for base in found.bases if self._has_settings(base))
        packages = {one.partition(".")[0] for one in (found.path, *bases)}
        return None if packages & self.changed else found

    def _has_settings(self, base: str) -> bool:
        known = self.classes.get(base)
        return bool(known.settings) if known else base.endswith("Trainer")


def version(package: str) -> str:
    """The installed version without what names a build, ``+cpu``; empty where there is none."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def read(file: Path = FILE) -> Description:
    """The description in the package.

    Args:
        file: another one.
    """
    return from_json(json.loads(file.read_text("utf-8")))


def from_json(there: Mapping[str, Any]) -> Description:
    """A description from what :func:`to_json` makes of it."""

    def described(path: str, one: Mapping[str, Any]) -> Described:
        settings = tuple(Setting(**setting) for setting in one["settings"])
        rest = {k: v for k, v in one.items() if k not in ("settings", "bases")}
        return Described(path, settings=settings, bases=tuple(one.get("bases", ())), **rest)

    return Description(
        versions=there["versions"],
        commands={name: described(name, one) for name, one in there["commands"].items()},
        classes={path: described(path, one) for path, one in there["classes"].items()},
        kinds={kind: tuple(paths) for kind, paths in there["kinds"].items()},
        groups=there["groups"],
        elsewhere={
            kind: {package: tuple(names) for package, names in by.items()}
            for kind, by in there["elsewhere"].items()
        },
    )


def to_json(description: Description) -> str:
    """A text with a line for each setting, sorted, without what is as by default."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def given(one: Setting) -> dict[str, Any]:
        kept = {"name": one.name, "type": one.type}
        if one.default is not None:
            kept["default"] = one.default
        return {**kept, **({"required": True} if one.required else {}), "doc": one.doc}

    def entry(path: str, one: Described) -> str:
        own = {k: getattr(one, k) for k in ("defined", "bases", "abstract", "open")}
        head = {"doc": one.doc, **{key: value for key, value in own.items() if value}}
        settings = ",\n".join(f"   {line(given(setting))}" for setting in one.settings)
        body = f"[\n{settings}\n  ]" if settings else "[]"
        return f'  {line(path)}: {{\n   {line(head)[1:-1]},\n   "settings": {body}}}'

    def entries(of: Mapping[str, Described]) -> str:
        return "{\n" + ",\n".join(entry(path, of[path]) for path in sorted(of)) + "\n }"

    def lists(of: Mapping[str, tuple[str, ...]]) -> str:
        texts = {key: ",\n".join(f"   {line(one)}" for one in of[key]) for key in sorted(of)}
        return "{\n" + ",\n".join(f"  {line(k)}: [\n{text}]" for k, text in texts.items()) + "\n }"

    def table(of: Mapping[str, Any]) -> str:
        return "{\n" + ",\n".join(f"  {line(k)}: {line(of[k])}" for k in sorted(of)) + "\n }"

    parts = {
        "versions": table(description.versions),
        "commands": entries(description.commands),
        "groups": table(description.groups),
        "kinds": lists(description.kinds),
        "elsewhere": table(description.elsewhere),
        "classes": entries(description.classes),
    }
    return "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n"
