"""The arrows of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sharded_adadiag"
# What each room may import of ours; files at the top level may import everything.
ALLOWED = {
    "algorithm": {"options", "algorithm"},
    "plan": {"options", "algorithm", "plan", "step"},
    "comm": {"plan", "comm"},
    "planner": {"options", "algorithm", "plan", "params", "planner"},
    "testing": {"testing"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            if name.startswith("sharded_adadiag."):
                assert name.split(".")[1] in ALLOWED[room], f"{file.name}: {name}"


@pytest.mark.parametrize("room", ["algorithm", "plan"])
def test_maths_and_plans_know_no_process_groups(room):
    for file in (PACKAGE / room).glob("*.py"):
        assert not any("distributed" in name for name in imported(file)), file.name


def test_examples_use_public_names_only():
    for file in (PACKAGE.parent / "examples").rglob("*.py"):
        for name in imported(file):
            assert not name.startswith("sharded_adadiag."), f"{file.name}: {name}"
