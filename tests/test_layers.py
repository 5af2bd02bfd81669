"""The map of the house: who may import whom, in the package and in its tests."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "sharded_adadiag"
TESTS = ROOT / "tests"
# What each room, and each module of the top level, may import besides itself. Arrows go
# down only; imports for type checkers and inside functions count.
ALLOWED = {
    "options": "",
    "algorithm": "options",
    "plan": "options algorithm",
    "comm": "plan",
    "params": "options algorithm plan",
    "step": "options algorithm plan comm params",
    "checkpoint": "options algorithm plan comm params step",
    "zero": "options algorithm plan comm params step checkpoint",
    "binding": "options algorithm plan comm params step checkpoint zero",
    "optimizer": "options algorithm plan comm params checkpoint zero binding",
    "__init__": "plan params checkpoint zero optimizer",
    "planner": "options algorithm plan params",
    "__main__": "options plan planner",
    "run": "__init__",
    "testing": "",
}
TOP_LEVEL = {"__init__", "__main__", "binding", "optimizer", "options", "run"}


def imported(path: Path) -> set[str]:
    """What a file imports: ``a`` for ``import a``, ``a.b`` for ``from a import b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def module_of(name: str) -> str:
    """The module of ours, as ``room.name``, that an imported name is or is in."""
    inside = name.split(".")[1:]
    while not PACKAGE.joinpath(*inside).is_dir():
        if PACKAGE.joinpath(*inside).with_suffix(".py").exists():
            return ".".join(inside)
        inside.pop()
    return ".".join([*inside, "__init__"])


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Each module of the package with those of ours it imports."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        ours = [n for n in imported(file) if n.split(".")[0] == "sharded_adadiag"]
        found[".".join(parts)] = {module_of(name) for name in ours}
    assert len(found) > 50
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def goes_up(source: str, target: str) -> bool:
    return room(target) not in {room(source), *ALLOWED[room(source)].split()}


def circle() -> list[str]:
    """Modules that import each other in a circle, first and last the same; or none."""
    try:
        graphlib.TopologicalSorter(arrows()).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_every_room_is_on_the_map_whose_arrows_make_no_circle():
    assert {room(module) for module in arrows()} <= ALLOWED.keys()
    targets = {name: allowed.split() for name, allowed in ALLOWED.items()}
    assert set(graphlib.TopologicalSorter(targets).static_order()) == ALLOWED.keys()


def test_the_top_level_has_few_modules():
    assert {file.stem for file in PACKAGE.glob("*.py")} <= TOP_LEVEL
    assert len(TOP_LEVEL) <= 6


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_only_what_it_may(name):
    for source, targets in arrows().items():
        for target in targets:
            if room(source) == name:
                assert not goes_up(source, target), f"{source} imports {target}"


def test_no_modules_import_each_other_in_a_circle():
    assert not circle()


@pytest.mark.parametrize("name", ["algorithm", "plan", "planner"])
def test_maths_and_plans_know_no_process_groups(name):
    for file in (PACKAGE / name).glob("*.py"):
        assert not any("distributed" in found for found in imported(file)), file.name


def test_examples_use_public_names_only():
    for file in (ROOT / "examples").rglob("*.py"):
        for name in imported(file):
            if name.startswith("sharded_adadiag."):
                assert module_of(name) == "__init__", f"{file.name}: {name}"


# --------------------------------------------------------------------------- the tests


def test_no_test_module_imports_another():
    files = list(TESTS.rglob("*.py"))
    modules = {f.stem for f in files if f.parent.name != "support"}
    assert len(modules) > 50
    for file in files:
        for name in imported(file):
            first = name.split(".")[0]
            assert first not in modules, f"{file.name} imports {name}"


def test_tests_mirror_the_package():
    rooms = {file.name for file in PACKAGE.iterdir() if file.is_dir()}
    folders = {file.parent.name for file in TESTS.rglob("test_*.py")} - {"tests"}
    assert folders - {"jobs"} <= rooms
