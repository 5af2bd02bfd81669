"""Runs of the pretraining example as a user starts them, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils import _pytree as pytree

from support import ROOT

EXAMPLES = ROOT / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

import checkpoints  # noqa: E402
import metrics  # noqa: E402

EXAMPLE = EXAMPLES / "pretrain_llama.py"
QUICK = Path(__file__).with_name("saboteur.py")  # the example with a quicker model
STEPS = 6


def torchrun(num_ranks: int, *options: str) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*start, f"--nproc-per-node={num_ranks}", *options]


def flags(run_dir: Path, *more: str) -> list[str]:
    """A tiny run of a few steps; later flags win."""
    package = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    return [
        *("--model", "tiny", "--steps", str(STEPS), "--data", str(package)),
        *("--val-batches", "2", "--val-every", "3", "--save-every", "3"),
        *("--cache-dir", str(run_dir.parent / "cache"), "--run-dir", str(run_dir)),
        *("--device", "cpu", *more),
    ]


def environment(**more: str) -> dict[str, str]:
    path = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **path, **more}


def execute(
    command: list[str], **more_environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; its output is one text."""
    return subprocess.run(
        command,
        env=environment(**more_environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def command(num_ranks: int, run_dir: Path, *more: str, program: Path) -> list[str]:
    """A run; on one rank without torchrun."""
    start = torchrun(num_ranks) if num_ranks > 1 else [sys.executable]
    return [*start, str(program), *flags(run_dir, *more)]


def run(
    num_ranks: int,
    run_dir: Path,
    *more: str,
    program: Path = QUICK,
    **more_environment: str,
) -> str:
    """A run that must succeed; returns its output."""
    start = command(num_ranks, run_dir, *more, program=program)
    done = execute(start, **more_environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without the times."""
    lines = metrics.read_lines(run_dir / "metrics.jsonl")
    timed = ("tokens_per_s", "optimizer_share")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def read_losses(run_dir: Path) -> torch.Tensor:
    """Training and validation loss by step, [steps, 2]; 0 where not validated."""
    results = read_results(run_dir)
    return torch.tensor([[line["loss"], line["val_loss"] or 0.0] for line in results])


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint by its path: full tensors and plain values."""
    whole = checkpoint.with_name(f"{checkpoint.name}.whole")
    dcp_to_torch_save(checkpoint, whole)
    sharded = torch.load(whole, weights_only=True)
    whole.unlink()
    content = {"sharded": sharded, "run": checkpoints.read_run(checkpoint)}
    del content["run"]["settings"]  # with the flags that may differ
    leaves, _ = pytree.tree_flatten_with_path(content)
    return {pytree.keystr(path): value for path, value in leaves}


def assert_same_end(run_dir: Path, whole: Path) -> None:
    """A run has the metrics and the last checkpoint of another, bit for bit."""
    assert read_results(run_dir) == read_results(whole)
    last = Path("checkpoints", f"step-{STEPS}")
    got, expected = read_checkpoint(run_dir / last), read_checkpoint(whole / last)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == got[name].dtype, name
            assert torch.equal(value, got[name]), name
        else:
            assert value == got[name], name
