"""Pages of classes: what one takes, and which there are for a setting."""

from rotopo.described import Described, Description, Setting
from rotopo.help.layout import entries, page, paragraph, table
from rotopo.help.settings import classes_of, kinds_of, leaves, type_of, value


def class_page(description: Description, name: str, setting: Setting, one: Described) -> str:
    """What a class is and takes.

    Args:
        description: all that is described.
        name: of the setting that takes the class, with dots.
        setting: the setting.
        one: the class.
    """
    added = "+=" if setting.type.startswith("list[") else " "
    shown = [
        (head(f"--{name}.{own}", it), _said(description, f"{name}.{own}", it))
        for own, it in leaves(description, one.by_name)
    ]
    return page(
        paragraph(f"{one.path}: {one.doc}." if one.doc else one.path),
        f"Settings, after --{name}{added}{_shortest(description, one)}:"
        if shown
        else "It takes no settings.",
        entries(shown),
        paragraph("It may take others, which it hands on." if one.open else ""),
    )


def kind_page(description: Description, command: str, name: str, setting: Setting) -> str:
    """The classes that a setting takes."""
    rows = [
        (_shortest(description, one), one.doc)
        for one in sorted(classes_of(description, setting), key=lambda one: one.name.lower())
    ]
    width = min(30, max(len(shown) for shown, _ in rows) + 4)
    others = [
        paragraph(f"Of {package}: {', '.join(names)}.", 2)
        for kind in kinds_of(description, setting)
        for package, names in description.elsewhere.get(kind, {}).items()
    ]
    return page(
        paragraph(f"--{name} ({type_of(setting)}): {setting.doc}." if setting.doc else f"--{name}"),
        table(rows, width),
        *others,
        paragraph(
            f"What one of them takes: rotopo {command} --{name}.help NAME. A class of your own "
            "is named by its path, my_package.my_module.MyClass."
        ),
    )


def group_page(description: Description, name: str, setting: Setting) -> str:
    """The settings of a group."""
    of = description.of(description.groups[setting.type])
    assert of is not None  # a group is ours
    shown = [
        (head(f"--{name}.{own}", it), _said(description, f"{name}.{own}", it))
        for own, it in leaves(description, of.by_name)
    ]
    return page(paragraph(f"--{name}: {of.doc}."), entries(shown))


def head(name: str, setting: Setting) -> str:
    """A setting with its type and default."""
    default = "(required)" if setting.required else f"= {value(setting.default)}"
    return f"{name}: {type_of(setting)} {default}"


def _said(description: Description, name: str, setting: Setting) -> str:
    said = setting.doc
    if kinds_of(description, setting):
        said = f"{said}; which: --{name}.help".removeprefix("; ")
    return said


def _shortest(description: Description, one: Described) -> str:
    """The short name of a class, or the path where others have that name."""
    same = [other for other in description.classes.values() if other.name == one.name]
    return one.name if len(same) == 1 else one.path
