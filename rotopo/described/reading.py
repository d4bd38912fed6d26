"""Files of settings as YAML's nodes, which know their lines."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from rotopo.described.nearest import meant, nearest_file

FILES = (".yaml", ".yml", ".json")
NULL = "tag:yaml.org,2002:null"
TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"


def read(value: str) -> tuple[yaml.Node | None, str, str | None]:
    """What is in a file of settings, or in a text of them.

    Args:
        value: the file's name, or the text.

    Returns:
        What is in it, the file's name (empty of a text), and what is wrong with it: nothing of
        what is in doubt, such as a file elsewhere.
    """
    nothing = None, "", None
    if "://" in value or "::" in value or value == "-":
        return nothing
    path = Path(value).expanduser()
    try:
        there, is_file = path.exists(), path.is_file()
    except (OSError, ValueError):  # too long for a name: a text
        there = is_file = False
    try:
        text = path.read_text("utf-8") if is_file else value
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if not is_file or mark is None:
            return nothing
        return None, value, f"{value}, line {mark.line + 1}: not YAML: {error.problem}"
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return nothing
    if is_file or isinstance(node, yaml.CollectionNode):
        return node, value if is_file else "", None
    if there:
        has = (path / "config.yaml").is_file()
        near = f"{value.rstrip('/')}/config.yaml" if has else None
        return None, value, f"{value}: is a folder, not a file of settings{meant(near)}"
    return None, value, f"{value}: no such file{meant(nearest_file(str(path)))}"


def read_value(text: str) -> yaml.Node | None:
    """A value on a command line; None of what is in doubt."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    if isinstance(node, yaml.CollectionNode):
        return node
    mark = yaml.Mark("", 0, 0, 0, "", 0)
    return yaml.ScalarNode(NULL if text in ("null", "~", "") else TEXT, text, mark, mark)


def entries(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Keys and values, those that are merged in first."""
    for key, value in node.value:
        if key.tag == MERGE:
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(one, yaml.MappingNode):
                    yield from entries(one)
    yield from ((key, value) for key, value in node.value if key.tag != MERGE)
