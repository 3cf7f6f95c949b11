"""The house: rooms and floors, one way down, names that stand once, and code in one style."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT
from lessons import LESSONS, cells, source

PACKAGE = ROOT / "finetune_nb"
FLOORS = (
    ("environment", "tables", "checks", "__init__"),
    ("distributed",),
    ("resumable",),
    ("data", "models"),
    ("features",),
    ("evaluation",),
    ("training", "preprocessing"),
    ("report", "weight_tuning", "structure_tuning", "distillation"),
    ("application", "showcase"),
    ("comparison", "hyperparameters", "scalability", "hardening"),
    ("cli",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
ROOMS = sorted(p.parent for p in MODULES if p.name == "__init__.py" and p.parent != PACKAGE)
MOST_LINES, MOST_NAMES, MOST_MODULES = 350, 12, 10


def name_of(path):
    """A module's dotted name inside the package; a room's `__init__` bears the room's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def resolved(node, path):
    """The dotted name, inside the package, of what an import reads from; None if foreign."""
    if node.level:
        here = path.relative_to(PACKAGE).parts[:-1]
        base = here[: len(here) - (node.level - 1)]
        return ".".join([*base, *filter(None, [node.module])])
    if node.module and node.module.split(".")[0] == "finetune_nb":
        return node.module.partition(".")[2] or "__init__"
    return None


def imported(path):
    """Dotted names of the project's modules that a file imports from, at any depth."""
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom)]
    return {name for node in nodes if (name := resolved(node, path)) is not None}


def public(path):
    """Names of a module's `__all__`."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            try:
                found = ast.literal_eval(node.value)
            except ValueError:
                continue
            if found:
                return found
    return []


def defined(path):
    """Public functions and classes that a module defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in tree_of(path).body if isinstance(n, kinds) and n.name[0] != "_"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_way_down(path):
    name = name_of(path)
    room = name.split(".")[0]
    assert room in FLOOR, f"{room} has no floor: add it to FLOORS, and to the design"
    for other in imported(path):
        top = other.split(".")[0]
        if top != room:
            assert FLOOR[top] < FLOOR[room], f"{name} (floor {FLOOR[room]}) imports {other}"


def test_no_circles_inside_a_room():
    edges = {name_of(p): imported(p) for p in MODULES if p.name != "__init__.py"}
    done, path = set(), []

    def walk(name):
        assert name not in path, f"a circle: {' → '.join([*path, name])}"
        if name in done:
            return
        path.append(name)
        for other in edges.get(name, ()):
            walk(other)
        path.pop()
        done.add(name)

    for name in edges:
        walk(name)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_dodges_a_floor(path):
    """The project's modules are imported at the top of a file, where the floors can be seen."""
    if path.stem == "cli":  # the top floor: a verb loads what it needs, so that --help is quick
        return
    for outer in ast.walk(tree_of(path)):
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = [n for n in ast.walk(outer) if isinstance(n, ast.ImportFrom)]
            dodged = [resolved(n, path) for n in inside if resolved(n, path) is not None]
            assert not dodged, f"{name_of(path)}.{outer.name} imports {dodged} inside"


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.name)
def test_room_hands_on_its_names(room):
    modules = [p for p in room.glob("*.py") if p.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, f"{room.name} has {len(modules)} modules"
    handed = set(public(room / "__init__.py"))
    for path in modules:
        missing = set(public(path)) - handed
        assert not missing, f"finetune_nb.{room.name} does not hand on {missing} of {path.stem}"


def test_no_module_bears_the_name_of_a_function():
    names = {name for path in MODULES if path.stem != "cli" for name in defined(path)}
    clash = {name_of(p) for p in MODULES if name_of(p).split(".")[-1] in names}
    # The room models hands on the function `anatomy`, which is not among the names of the package.
    clash -= {"models.anatomy"}
    assert not clash, f"{clash}: `from finetune_nb import *` must give functions"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name_of(path)} has {lines} lines"
    own = [name for name in defined(path) if name in public(path)]
    if name_of(path) not in ("cli", "checks"):
        assert len(own) <= MOST_NAMES, f"{name_of(path)} has {len(own)} public names"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_names_what_it_imports(path):
    for cell in cells(path, "code"):
        for line in source(cell).splitlines():
            assert not (line.startswith("from ") and line.endswith("import *")), (
                f"{path.name}: {line}"
            )


def ruff(*arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "nbs", "tests", "setup.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_code_is_formatted():
    done = ruff("format", "--check")
    assert done.returncode == 0, f"run `ruff format nbs tests setup.py`\n{done.stdout}"


def test_code_is_clean():
    """Line length, one statement a line, no assigned lambda, no unused or undefined name."""
    done = ruff("check", "--output-format", "concise")
    assert done.returncode == 0, done.stdout
