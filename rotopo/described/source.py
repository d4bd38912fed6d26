"""Whether a package's source has a name, without importing it."""

from importlib.util import find_spec
from pathlib import Path


def is_nowhere(class_path: str) -> bool:
    """Whether a class path of an installed package surely names nothing: the name is a word of no
    file in the folder that its module is in.

    A class of ours that has left its file for another is found in its room, see
    :func:`rotopo.parsing.find_classes`; so the whole room is looked through.
    """
    package, *modules, name = class_path.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    for module in modules[:1] if package == "rotopo" else modules:
        if (folder / module).is_dir():
            folder = folder / module
        elif any((folder / f"{module}{suffix}").exists() for suffix in (".py", ".pyi", ".so")):
            break
        else:
            return True
    files = folder.rglob("*.py") if package == "rotopo" else folder.glob("*.py*")
    return not any(name in file.read_text("utf-8", "replace") for file in files if file.is_file())
