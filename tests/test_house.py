"""The house: imports run down its floors, and every file can be read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400

# From the ground up. A file may import from below and from its own floor; class paths in a user's
# YAML are no imports.
FLOORS = (
    ("described", "devices", "endings", "errors", "files", "ranks", "intervals"),
    ("pretrained", "progress", "refusals", "threads"),
    ("data", "rotation"),
    ("models",),
    ("run",),
    ("metrics",),
    ("callbacks", "muon", "optimisers", "training", "trainer", "strategies"),
    ("objectives", "reward", "robust"),
    ("parsing", "introspection", "lightning_cli", "load"),
    ("judge", "report", "export", "plan", "help", "compare"),
    ("studies",),
    ("cli", "describe"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """The package's files by the names of their modules."""
    found = {}
    for file in sorted((ROOT / "rotopo").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a file imports anywhere: in functions and for types alone too,
    and by the strings of the table of commands."""
    names = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and file.name == "cli.py":
            names += [node.value] if str(node.value).startswith("rotopo.") else []
    found = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name and name != "rotopo":
            found.add(name)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(file, known) - {name} for name, file in known.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor(graph):
    assert {room(module) for module in graph if module != "rotopo"} == FLOOR.keys()


def test_imports_run_down(graph):
    up = [
        f"{module} imports {other}, which is above it"
        for module, others in graph.items()
        for other in sorted(others)
        if module != "rotopo" and FLOOR[room(other)] > FLOOR[room(module)]
    ]
    assert not up


def test_there_is_no_circle(graph):
    """Whatever has nothing to wait for goes, again and again; what is left waits for itself."""
    left = {module: set(others) for module, others in graph.items()}
    while ready := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in ready}
    assert not left


@pytest.mark.parametrize("folder", ["rotopo", "tools"])
def test_files_are_short(folder):
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines())
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix != ".json" and "__pycache__" not in file.parts
    }
    assert not {file: n for file, n in lines.items() if n > MOST_LINES}


def test_the_reading_would_see_an_import_that_runs_up(tmp_path):
    file = tmp_path / "cli.py"
    file.write_text(
        "def later():\n    from rotopo.data import batch\n"
        "if TYPE_CHECKING:\n    import rotopo.training\n"
        "TABLE = {'plan': 'rotopo.plan.command.plan'}\n"
    )
    known = modules()
    assert imported(file, known) == {"rotopo.data.batch", "rotopo.training", "rotopo.plan.command"}
