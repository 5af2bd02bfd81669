"""The main job on two hosts whose connection breaks.

The hosts are network namespaces of this machine, each with a name and an address of its
own, joined by one cable (a veth pair).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, launching

STEPS = 60


class Hosts:
    """node-0 and node-1; pulling out the cable leaves both running."""

    def __init__(self, folder: Path) -> None:
        self._spaces = [f"adadiag-{os.getpid()}-{i}" for i in range(2)]
        self._names = folder / "hosts"
        self._names.write_text(
            "127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n"
        )

    def build(self) -> None:
        for space in self._spaces:
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
        end = ["type", "veth", "peer", "name", "cable", "netns", self._spaces[1]]
        _run("ip", "link", "add", "cable", "netns", self._spaces[0], *end)
        for i, space in enumerate(self._spaces):
            address = f"10.77.0.{i + 1}/24"
            _run("ip", "-n", space, "address", "add", address, "dev", "cable")
            _run("ip", "-n", space, "link", "set", "cable", "up")
            _run(*self.command(i, "true"))

    def command(self, i: int, *command: str) -> list[str]:
        """A command that runs `command` on host i."""
        # The mount is seen by this command only: ip gives it a mount namespace.
        script = (
            f"echo node-{i} > /proc/sys/kernel/hostname;"
            ' mount --bind "$0" /etc/hosts && exec "$@"'
        )
        enter = ["ip", "netns", "exec", self._spaces[i], "unshare", "--uts"]
        return [*enter, "sh", "-c", script, str(self._names), *command]

    def connect(self, state: str) -> None:
        _run("ip", "-n", self._spaces[0], "link", "set", "cable", state)

    def remove(self) -> None:
        for space in self._spaces:
            inside = subprocess.run(
                ["ip", "netns", "pids", space], capture_output=True, text=True
            )
            for pid in inside.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not installed")
    made = Hosts(tmp_path)
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def start(hosts: Hosts, folder: Path, timeout_s: int) -> list[subprocess.Popen]:
    """The same command on both hosts; host i prints to log-i."""
    env = launching.environment(folder, RUN_DIR=folder / "run", HOST="node-0", IDLE_S=3)
    flags = launching.flags(folder, steps=STEPS, save_every=5)
    job = ["bash", "launch/torchrun_c10d.sh", *flags, "--timeout-s", str(timeout_s)]
    return [
        launching.start(hosts.command(i, *job), env, folder / f"log-{i}")
        for i in range(2)
    ]


def read_logs(folder: Path) -> list[str]:
    return [(folder / f"log-{i}").read_text() for i in range(2)]


@pytest.mark.multiprocess
@pytest.mark.xdist_group("two_hosts")
def test_a_broken_connection_ends_both_sides_and_the_job_continues(
    hosts: Hosts, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    undisturbed = subprocess.run(
        [
            "bash",
            "launch/pretrain.sh",
            *launching.flags(tmp_path, steps=STEPS, save_every=5),
        ]
        + ["--run-dir", str(whole)],
        cwd=ROOT,
        env=launching.environment(tmp_path, RANKS=2),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr

    nodes = start(hosts, tmp_path, timeout_s=15)
    launching.wait_until(lambda: len(launching.read_results(run)) > 12, *nodes)
    hosts.connect("down")
    codes = launching.finish(*nodes)
    logs = read_logs(tmp_path)
    assert 0 not in codes, logs
    for log in logs:
        assert "communication with the other ranks failed" in log
        assert "Timed out waiting 15000ms" in log
    assert len(launching.read_results(run)) < STEPS

    hosts.connect("up")
    nodes = start(hosts, tmp_path, timeout_s=120)
    codes = launching.finish(*nodes)
    logs = read_logs(tmp_path)
    assert codes == [0, 0], logs
    assert "continuing from" in logs[0] + logs[1]
    assert launching.read_results(run) == launching.read_results(whole)
