"""Which Python a launcher uses, what it installs, and what it does with its arguments.

The Pythons of most tests are stand-ins: shell scripts that answer as the real ones do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.launching import environment

# Beside it, the file `lacks` is what launch/lacking.py would print: none, no torch.
PYTHON = """#!/usr/bin/env bash
here="$(dirname "$0")"
echo "$0 $*" >> "$LOG"
case "$*" in
    *lacking.py*) [ -e "$here/lacks" ] && cat "$here/lacks" ;;
    *--dry-run*) [ "$ONLINE" = yes ] ;;
    "-m venv"*)
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        cp "$0" "$4/bin/pip"
        echo "PATH='$4/bin:$PATH'" > "$4/bin/activate"
        ;;
    "-m pip install"*) echo "pip says how far it is"; echo "torch==2" > "$here/lacks" ;;
esac
"""


class Checkout:
    """A copy of the launchers, and a Python that is active."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        self.bin = folder / "active"
        self.bin.mkdir()
        self.log = folder / "log"
        for name in ("python", "python3"):
            (self.bin / name).write_text(PYTHON)
            (self.bin / name).chmod(0o755)

    def find(
        self, *arguments: str, online: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Sources environment.sh; prints the Python that it found."""
        self.log.write_text("")
        env = {k: v for k, v in os.environ.items() if k != "SHARDED_ADADIAG_PYTHON_ENV"}
        env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "LOG": str(self.log)}
        env["ONLINE"] = "yes" if online else "no"
        script = '. launch/environment.sh "$@"; echo "found $python"'
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
        )

    def has(self, *lacks: str) -> None:
        """The active Python has torch, but not the requirements `lacks`."""
        (self.bin / "lacks").write_text("\n".join(["torch==2.12.1", *lacks]) + "\n")

    @property
    def installed(self) -> list[str]:
        """The arguments of each pip install that was not a mere question."""
        calls = self.log.read_text().splitlines()
        installs = [call for call in calls if "-m pip install" in call]
        return [call for call in installs if "--dry-run" not in call]

    @property
    def own(self) -> str:
        return str(self.root / ".venv/bin/python")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_an_active_environment_with_all_that_is_needed_is_used_as_it_is(
    checkout: Checkout,
) -> None:
    checkout.has()
    done = checkout.find("examples")
    assert f"found {checkout.bin}/python\n" in done.stdout
    assert "the active environment, torch==2.12.1" in done.stdout
    assert not checkout.installed
    assert not (checkout.root / ".venv").exists()


def test_what_an_active_environment_lacks_is_added_and_its_torch_stays(
    checkout: Checkout,
) -> None:
    checkout.has("tqdm", "transformers>=5")
    done = checkout.find("examples")
    assert f"found {checkout.bin}/python\n" in done.stdout
    (call,) = checkout.installed
    assert call.endswith(" torch==2.12.1 tqdm transformers>=5")
    assert "pip says how far it is" in done.stdout


def test_without_torch_an_environment_is_made_once(checkout: Checkout) -> None:
    done = checkout.find("examples")
    assert done.returncode == 0, done.stderr
    assert f"found {checkout.own}\n" in done.stdout
    assert [call.split()[-1] for call in checkout.installed] == [
        "torch==2.13.0",
        f"{checkout.root}[examples]",
    ]
    again = checkout.find("examples", online=False)
    assert f"found {checkout.own}\n" in again.stdout
    assert not checkout.installed


def test_a_complete_one_is_preferred_to_changing_the_active_one(
    checkout: Checkout,
) -> None:
    checkout.find("examples")
    checkout.has("tqdm")
    assert f"found {checkout.own}\n" in checkout.find("examples").stdout
    assert not checkout.installed


def test_an_environment_that_was_not_finished_is_completed(checkout: Checkout) -> None:
    checkout.find("examples")
    (checkout.root / ".venv/complete").unlink()
    assert f"found {checkout.own}\n" in checkout.find("examples").stdout
    assert len(checkout.installed) == 1


def test_the_tests_leave_an_environment_without_the_tools_alone(
    checkout: Checkout,
) -> None:
    checkout.has("ruff==0.17.6")
    done = checkout.find("dev", "dev", "whole")
    assert f"found {checkout.own}\n" in done.stdout
    assert not any(str(checkout.bin) in call for call in checkout.installed)


@pytest.mark.parametrize("active", ["has torch", "has none"])
def test_without_internet_one_line_says_what_to_do(
    active: str, checkout: Checkout
) -> None:
    if active == "has torch":
        checkout.has("tqdm")
    done = checkout.find("examples", online=False)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("environment: error: ")
    assert "bash launch/setup.sh" in line
    assert ("tqdm" if active == "has torch" else "torch==2.13.0") in line
    assert not checkout.installed


def test_lacking_tells_this_python_by_its_metadata() -> None:
    """Of a requirement that is met, and of one that never is."""
    program = (
        "import sys; sys.path.insert(0, 'launch'); import lacking;"
        "sys.argv = ['lacking.py', 'extra']; lacking.read_project = lambda: {"
        "'dependencies': ['torch>=2.11'], 'optional-dependencies': {'extra': ['numpy',"
        " 'torch>=2.11', 'no-such-thing-at-all>3', 'numpy<1; python_version<\"3\"',"
        " 'torch >= 99']}}; lacking.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("torch==2."), done.stderr
    assert lines[1:] == ["no-such-thing-at-all>3", "torch>=99"]


@pytest.mark.parametrize(
    "cores, ranks, set_by_user, expected",
    [
        ("16", "4", "", "4"),
        ("16", "3", "", "5"),
        ("2", "8", "", "1"),
        ("16", "cpu", "", "1"),
        ("16", "4", "7", "7"),
    ],
)
def test_ranks_share_the_cores(
    cores: str, ranks: str, set_by_user: str, expected: str
) -> None:
    script = (
        f". launch/job.sh; nproc() {{ echo {cores}; }};"
        f' sharded_adadiag_threads {ranks}; echo "$OMP_NUM_THREADS"'
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": set_by_user} if set_by_user else {}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{expected}\n", done.stderr


# --------------------------------------------------------------------- arguments

EVERYWHERE = {"NODE_RANK": "0", "MASTER_ADDR": "a", "HOST": "a", "HOSTFILE": "hosts"}
LAUNCHERS = [
    "pretrain.sh",
    "torchrun_static.sh",
    "torchrun_c10d.sh",
    "torchrun_elastic.sh",
    "deepspeed_hostfile.sh",
]


def start(
    script: str, *arguments: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A launcher called in `folder`, with this Python."""
    (folder / "hosts").write_text("a slots=1\n")
    env = environment(folder, **{**EVERYWHERE, **variables})
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_and_mistakes_are_told_once_before_anything_starts(
    script: str, tmp_path: Path
) -> None:
    done = start(script, "--help", folder=tmp_path, RUN_DIR="run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == 1
    assert "environment:" not in done.stdout and not done.stderr

    done = start(script, "--steps", "x", folder=tmp_path, RUN_DIR="run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--steps: invalid int value: 'x'")
    assert done.stderr.count("usage:") == 1 and not done.stdout

    done = start(script, "--hidden", "30", folder=tmp_path, RUN_DIR="run")
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain_llama.py: error: --hidden 30 is not")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


MINE = """
import os, sys
import sharded_adadiag_autoload  # the package of the checkout is on the path
with open(f"rank-{os.environ['RANK']}", "w") as file:
    file.write(" ".join(sys.argv[1:]))
if os.environ["RANK"] == "1":
    sys.exit(int(sys.argv[2]))
"""


@pytest.mark.multiprocess
def test_a_script_of_yours_gets_its_arguments_alone_and_its_exit_code_is_kept(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    done = start("pretrain.sh", "mine.py", "--lr", "7", folder=tmp_path, RANKS="2")
    assert done.returncode == 7, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == "--lr 7"
    assert "launch: rank 1 ended first, with exit code 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = start("torchrun_static.sh", "mine.py", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "launch: error: no file mine.py\n")


@pytest.mark.multiprocess
def test_what_only_the_ranks_can_find_wrong_is_told_once(tmp_path: Path) -> None:
    wrong = ["--model", "tiny", "--device", "cpu", "--data", str(tmp_path / "none")]
    done = start("pretrain.sh", *wrong, folder=tmp_path, RANKS="2")
    assert done.returncode == 2
    assert done.stderr == (
        f"pretrain_llama.py: error: --data {tmp_path}/none: no such file or folder\n"
    )


# ------------------------------------------------- what a run leaves, and the checks


def test_folders_at_hand_change_nothing_that_ruff_says(tmp_path: Path) -> None:
    """A folder `runs` in the root made the tests' `import runs` a first-party one."""
    for name in ("tests", "examples", "launch"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    modules = {path.stem for path in tmp_path.rglob("*.py")}
    for name in modules | {"torch", "numpy", "deepspeed", "data", "sharded_adadiag"}:
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "runs/code.py").write_text("import os, sys\n")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=I", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
