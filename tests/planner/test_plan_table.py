"""The table of docs/planning.md is what the command says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "plan_table.py"
PAGE = (ROOT / "docs" / "planning.md").read_text()
# What depends on the machine.
MEASURED = ("plan s", "process MB")


def rows(text: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, _, *body = lines
    return [dict(zip(head, line)) for line in body]


def in_the_page() -> list[dict[str, str]]:
    begin, end = "<!-- plan_table.py: begin -->", "<!-- plan_table.py: end -->"
    return rows(PAGE.split(begin)[1].split(end)[0])


def test_the_table_has_all_sizes():
    asked = {(row["model"], row["ranks"], row["layout"]) for row in in_the_page()}
    for model in ("llama-7b", "llama-70b"):
        for ranks in ("8", "64", "512", "4,096"):
            assert {(model, ranks, "fsdp2"), (model, ranks, "zero")} <= asked
    assert ("llama-7b", "4,096", "HSDP, 8 x 512") in asked


@pytest.mark.parametrize("layout", ["fsdp2", "zero"])
def test_rows_of_the_table_are_what_the_command_says(layout):
    """If this fails the plan has changed: make the table anew with the script."""
    command = [sys.executable, str(SCRIPT), "--models", "llama-7b"]
    command += ["--ranks", "64", "--layouts", layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (made,) = rows(done.stdout)
    key = ("model", "ranks", "layout")
    (told,) = (r for r in in_the_page() if all(r[k] == made[k] for k in key))
    for name in made:
        assert name in MEASURED or made[name] == told[name], name


def test_every_argument_and_figure_is_in_the_page():
    command = [sys.executable, "-m", "sharded_adadiag", "plan"]
    done = subprocess.run(
        [*command, "llama-60m", "--ranks", "2", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    echoed = {"model", "ranks", "layout", "replicas", "tensor_parallel", "optimizer"}
    told = {"distribution", "notes", "warnings", "routes", "work_max", "refresh_max"}
    for name in set(json.loads(done.stdout)) - echoed - told:
        assert f"`{name}`" in PAGE, name
    shown = subprocess.run([*command, "-h"], capture_output=True, text=True, check=True)
    for word in shown.stdout.split():
        if word.startswith("--") and word != "--help":
            assert word.strip(",]") in PAGE, word
