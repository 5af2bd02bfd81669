"""The tiers of the tests in the Makefile: every test is in one of them."""

import re
import shutil
import subprocess

import pytest
from support import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TIERS = ("unit", "threads", "processes", "jobs")


def expression(tier: str) -> str:
    """What pytest selects the tests of a tier by."""
    return re.search(rf'^{tier}:.*\n\t.* -m "?([a-z ]+)', MAKEFILE, re.MULTILINE)[1]


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize(
    "multiprocess,jobs", [(True, True), (True, False), (False, False)]
)
def test_every_test_is_in_one_tier(slow, multiprocess, jobs):
    marks = {"slow": slow, "multiprocess": multiprocess, "jobs": jobs}
    assert sum(eval(expression(tier), marks.copy()) for tier in TIERS) == 1


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [f"make {target}" for target in targets]
    assert all(len(line) == 2 and line[1] for line in lines)
