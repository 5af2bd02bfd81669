"""The ranks of the tests themselves: each call has processes of its own."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharded_adadiag.testing.ranks import run_processes

pytestmark = pytest.mark.multiprocess


def state_of_the_process(rank):
    """What a body may have changed, and what the group says."""
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return {
        "group": (dist.get_rank(), dist.get_world_size(), float(total)),
        "random": torch.rand(2).tolist(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "filters": warnings.filters[:1],
        "variable": os.environ.get("LEFT_BY_A_BODY"),
        "attribute": hasattr(torch, "left_by_a_body"),
    }


def change_everything(rank):
    before = state_of_the_process(rank)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    warnings.simplefilter("error")
    os.environ["LEFT_BY_A_BODY"] = "yes"
    torch.left_by_a_body = True
    assert state_of_the_process(rank) != before
    return before


def test_a_body_leaves_nothing_to_the_next_one():
    first = run_processes(2, change_everything)
    assert run_processes(2, state_of_the_process) == first
    assert [state["group"] for state in first] == [(0, 2, 1.0), (1, 2, 1.0)]
    assert [state["threads"] for state in first] == [1, 1]


def variable(rank):
    return os.environ.get("OF_THE_CALLER")


def test_ranks_have_the_environment_of_the_call(monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("OF_THE_CALLER", value)
        assert run_processes(1, variable) == [value]
    monkeypatch.delenv("OF_THE_CALLER")
    assert run_processes(1, variable) == [None]


def killed(rank):
    dist.barrier()  # the others do not need this rank any more
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raising(rank):
    if rank == 1:
        raise KeyError("a body's own error")
    return rank


def test_a_rank_that_fails_is_an_error_and_the_next_call_works():
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*exit code \[-9\]"):
        run_processes(2, killed)
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*a body's own error"):
        run_processes(2, raising)
    assert run_processes(1, raising) == [0]


def parent(rank):
    return os.getppid()


def test_what_forks_the_ranks_ends_with_the_interpreter():
    program = "import test_ranks as t; print(*t.run_processes(2, t.parent))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    first, second = done.stdout.split()
    assert first == second  # one process for both
    give_up = time.monotonic() + 30
    while runs(first):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def runs(pid):
    """Whether there is such a process that has not ended, waited for or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
