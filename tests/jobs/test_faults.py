"""Crashes of real runs: each is survived, or ends all ranks with one clear message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import (
    QUICK,
    assert_same_end,
    environment,
    execute,
    flags,
    read_losses,
    run,
    torchrun,
)

# runs has put the examples on the path
import checkpoints  # isort: skip

pytestmark = [pytest.mark.multiprocess, pytest.mark.xdist_group("faults")]

# Bases at steps 1 and 4, checkpoints at 2, 4 and 6.
FLAGS = ["--refresh-every", "3", "--save-every", "2", "--timeout-s", "60", "--resume"]
OWNER = [*FLAGS, "--distribution", "owner"]
BASES = 2  # that each of two ranks computes in a refresh


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in it share their tokens."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An undisturbed run; its dropout makes the losses depend on random numbers."""
    run(2, folder / "whole", *OWNER, DROPOUT="0.1")
    return folder / "whole"


def sabotaged(
    run_dir: Path, faults: list[dict[str, Any]], *more: str, restarts: int = 3
) -> subprocess.CompletedProcess[str]:
    """A run on two ranks that a fault strikes in each of its first starts."""
    options = [f"--max-restarts={restarts}", "--tee=3", f"--log-dir={run_dir}.log"]
    command = [*torchrun(2, *options), str(QUICK), *flags(run_dir, *more)]
    return execute(command, SABOTAGE=json.dumps(faults), DROPOUT="0.1")


def beginnings(output: str) -> list[str]:
    """Where each start of a run began."""
    found = re.findall(r"starting from (step 0)|continuing from .*/(step-\d+)", output)
    return [anew or checkpoint for anew, checkpoint in found]


def test_killed_in_a_refresh_and_in_a_step(folder: Path, whole: Path) -> None:
    run_dir = folder / "killed"
    in_refresh = {"where": "refresh", "call": 2 * BASES, "rank": 1, "after": 2}
    in_step = {"where": "step", "call": 3, "rank": 0, "after": 4}
    faults = [{**fault, "how": "kill"} for fault in (in_refresh, in_step)]
    done = sabotaged(run_dir, faults, *OWNER)
    assert done.returncode == 0, done.stdout
    assert beginnings(done.stdout) == ["step 0", "step-2", "step-4"]
    assert_same_end(run_dir, whole)


def test_killed_while_writing(folder: Path, whole: Path) -> None:
    """In the very first checkpoint, then in the second one of another start."""
    run_dir = folder / "writing"
    first = {"where": "save", "call": 5, "rank": 0}
    second = {"where": "save", "call": 5, "rank": 1, "after": 2}
    faults = [{**fault, "how": "kill"} for fault in (first, second)]
    done = sabotaged(run_dir, faults, *OWNER)
    assert done.returncode == 0, done.stdout
    assert beginnings(done.stdout) == ["step 0", "step 0", "step-2"]
    assert_same_end(run_dir, whole)
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left == ["step-4", "step-6"]


def test_a_node_that_is_gone_for_good(folder: Path) -> None:
    """Two nodes of one rank each; one goes on alone where both were."""
    run(1, folder / "one", *OWNER)
    run_dir = folder / "elastic"
    fault = {"where": "step", "how": "kill_node", "rank": 1, "call": 4, "after": 2}
    rendezvous = "store_type=file,last_call_timeout=10,join_timeout=60"
    node = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"),
        *("--nproc-per-node=1", "--max-restarts=3", "--local-addr=127.0.0.1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={folder / 'rendezvous'}"),
        *("--rdzv-id=faults", f"--rdzv-conf={rendezvous}"),
        *(str(QUICK), *flags(run_dir, *OWNER)),
    ]
    nodes = [
        subprocess.Popen(
            node,
            env=environment(SABOTAGE=json.dumps([fault])),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in nodes]
    finally:
        for process in nodes:
            process.kill()
    assert sorted(process.returncode for process in nodes) == [-9, 0], outputs
    assert sorted(beginnings("".join(outputs))) == ["step 0", "step-2"]
    assert "2 ranks wrote it, 1 go on" in "".join(outputs)
    torch.testing.assert_close(
        read_losses(run_dir), read_losses(folder / "one"), rtol=1e-5, atol=0.0
    )


def messages(output: str) -> list[str]:
    """The last error of each of the two ranks."""
    return [re.findall(rf"\[default{r}\]:(\w+Error: .*)", output)[-1] for r in (0, 1)]


def test_a_nan_on_one_rank_ends_all(folder: Path) -> None:
    fault = {"where": "step", "how": "poison", "rank": 1, "call": 3}
    done = sabotaged(folder / "nan", [fault], *OWNER, restarts=0)
    assert done.returncode == 1
    for message in messages(done.stdout):
        assert message.startswith("RuntimeError: model.layers.1.3.weight: its gradient")
        assert "has NaN or Inf entries" in message
    # The checkpoint that was being written is whole.
    assert checkpoints.newest(folder / "nan").name == "step-2"


def test_an_owner_out_of_memory_ends_all(folder: Path) -> None:
    fault = {"where": "refresh", "how": "run_out_of_memory", "rank": 1, "call": 1}
    distributed = [*FLAGS, "--distribution", "broadcast"]
    done = sabotaged(folder / "memory", [fault], *distributed, restarts=0)
    assert done.returncode == 1
    for rank, message in enumerate(messages(done.stdout)):
        assert re.match(r"RuntimeError: model\.layers\.\d\.\d\.weight: ", message)
        assert "rank 1, which works on it, could not compute the update" in message
        assert ("no room for the singular vectors" in message) == (rank == 1)


def test_a_full_disk_ends_all(folder: Path) -> None:
    fault = {"where": "save", "how": "fill_disk", "rank": 1, "call": 5, "after": 2}
    done = sabotaged(folder / "full", [fault], *OWNER, restarts=0)
    assert done.returncode == 1
    for message in messages(done.stdout):
        assert message.startswith("RuntimeError: the checkpoint of step 4 could not")
        assert "rank 1: OSError: [Errno 28] No space left on device" in message
        assert message.endswith("checkpoints/step-2")
