"""Starting the launchers of launch/ in tests: the tiny model, one rank on a node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT


def environment(folder: Path, **variables: object) -> dict[str, str]:
    """Variables for a launcher that uses this Python; runs and caches are in folder."""
    activate = folder / "python/bin/activate"
    if not activate.exists():
        activate.parent.mkdir(parents=True)
        activate.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    return {
        **os.environ,
        "SHARDED_ADADIAG_PYTHON_ENV": str(folder / "python"),
        "OMP_NUM_THREADS": "1",
        "RANKS": "1",
        **{name: str(value) for name, value in variables.items()},
    }


def flags(folder: Path, *, steps: int, save_every: int) -> list[str]:
    package = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    return [
        *("--model", "tiny", "--device", "cpu", "--data", str(package)),
        *("--cache-dir", str(folder / "cache"), "--val-batches", "2"),
        *("--steps", str(steps), "--save-every", str(save_every)),
        *("--timeout-s", "60"),  # what a failed test leaves behind does not stay
    ]


def start(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
        )


def wait_until(condition: Callable[[], Any], *nodes: subprocess.Popen) -> None:
    """Waits for a condition that comes true while the nodes run."""
    give_up = time.monotonic() + 240
    try:
        while not condition():
            codes = [node.poll() for node in nodes]
            assert not any(code is not None for code in codes), f"ended early: {codes}"
            assert time.monotonic() < give_up
            time.sleep(0.05)
    except BaseException:
        _end(*nodes)
        raise


def finish(*nodes: subprocess.Popen) -> list[int]:
    """Waits for the nodes to end; returns their exit codes."""
    try:
        return [node.wait(timeout=240) for node in nodes]
    finally:
        _end(*nodes)


def _end(*nodes: subprocess.Popen) -> None:
    for node in nodes:
        node.kill()
        node.wait()


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its times; a line being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(True) if line[-1] == "\n"]
    timed = ("tokens_per_s", "optimizer_share")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
