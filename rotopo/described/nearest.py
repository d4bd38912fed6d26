"""What somebody may have meant: names, class names and files that are nearly the same."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_MOST = 3000  # files that are looked at


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is nearly the same, upper and lower case, - and _ alike; None if none is."""
    plain: dict[str, str] = {}
    for one in names:
        plain.setdefault(_plain(one), one)
    found = get_close_matches(_plain(name), plain, 1, 0.7)
    return plain[found[0]] if found else None


def nearest_file(file: str) -> str | None:
    """A file of settings whose path is nearly the same, below the folder that is there."""
    folder = Path(file).parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    there = []
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if one[:1] != ".")
        deep = len(Path(at).relative_to(folder).parts) >= 3
        if deep:
            folders.clear()
        suffix = Path(file).suffix
        there += [os.path.join(at, one) for one in sorted(files) if Path(one).suffix == suffix]
        if len(there) > _MOST:
            break
    paths = [os.path.normpath(one) for one in there]
    same = [one for one in paths if Path(one).name == Path(file).name]
    return same[0] if len(same) == 1 else nearest(os.path.normpath(file), paths)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def meant(found: str | None) -> str:
    """The words for it."""
    return f"; did you mean {found}?" if found else ""
