"""The launchers, run with two nodes of one rank that are both this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, launching

sys.path.insert(0, str(ROOT / "examples"))

import settings

STEPS = 40
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def start_node(script: str, folder: Path, **variables: object) -> subprocess.Popen:
    env = launching.environment(folder, RUN_DIR=folder / "run", **variables)
    command = ["bash", f"launch/{script}"]
    command += launching.flags(folder, steps=STEPS, save_every=5)
    log = folder / "log"
    return launching.start(command, env, log)


def finish(nodes: list[subprocess.Popen], folder: Path) -> str:
    """Waits for the nodes to end well; returns what they printed."""
    codes = launching.finish(*nodes)
    output = (folder / "log").read_text()
    assert codes == [0] * len(nodes), output
    return output


# What the script uses of Slurm: srun starts a task per node, hostname is the node's.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""
HOSTNAME = "#!/usr/bin/env bash\necho localhost\n"


@pytest.fixture(scope="module")
def slurm_run(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results under Slurm, which starts torchrun_static.sh on every node."""
    folder = tmp_path_factory.mktemp("slurm")
    stubs = folder / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("hostname", HOSTNAME)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    script = shutil.copy(ROOT / "launch/slurm.sh", folder / "slurm_script")
    slurm = {
        "SLURM_NNODES": 2,
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_JOB_ID": launching.free_port(),
        "PATH": f"{stubs}:{os.environ['PATH']}",
    }
    env = launching.environment(folder, RUN_DIR=folder / "run", **slurm)
    command = ["bash", script, *launching.flags(folder, steps=STEPS, save_every=5)]
    job = launching.start(command, env, folder / "log")
    assert "world size 2 on cpu" in finish([job], folder)
    return launching.read_results(folder / "run")


@pytest.mark.multiprocess
@pytest.mark.xdist_group("launch")
def test_slurm_nodes_train_together(slurm_run: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in slurm_run] == list(range(1, STEPS + 1))
    assert slurm_run[-1]["val_loss"] < slurm_run[0]["loss"]


@pytest.mark.multiprocess
@pytest.mark.xdist_group("launch")
def test_nodes_that_meet_train_together(
    slurm_run: list[dict[str, Any]], tmp_path: Path
) -> None:
    where = {"HOST": "localhost", "PORT": launching.free_port()}
    nodes = [start_node("torchrun_c10d.sh", tmp_path, **where) for _ in range(2)]
    assert "world size 2 on cpu" in finish(nodes, tmp_path)
    assert launching.read_results(tmp_path / "run") == slurm_run


@pytest.mark.multiprocess
@pytest.mark.xdist_group("launch")
def test_elastic_nodes_continue_after_a_crash(
    slurm_run: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Two nodes at least: so the one that is faster after the crash waits."""
    where = {"HOST": "localhost", "PORT": launching.free_port(), "MIN_NODES": 2}
    nodes = [start_node("torchrun_elastic.sh", tmp_path, **where) for _ in range(2)]
    run = tmp_path / "run"
    launching.wait_until(lambda: len(launching.read_results(run)) > 7, *nodes)
    os.kill(find_rank(nodes[0]), signal.SIGKILL)
    output = finish(nodes, tmp_path)
    assert "communication with the other ranks failed" in output
    assert "continuing from" in output
    assert launching.read_results(run) == slurm_run


def find_rank(node: subprocess.Popen) -> int:
    """The rank that a torchrun has started."""
    for children in Path(f"/proc/{node.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            if b"pretrain_llama.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError(f"process {node.pid} has no rank")


# The fields that the job has of a TrainJob's (Kubeflow Trainer 2.2): a cluster refuses
# unknown ones.
FIELDS = {
    "spec": {"runtimeRef", "trainer", "runtimePatches"},
    "trainer": {
        *("image", "command", "args", "env"),
        *("numNodes", "numProcPerNode", "resourcesPerNode"),
    },
    "pod": {"volumes", "containers", "terminationGracePeriodSeconds"},
    "container": {"name", "volumeMounts"},
}


def read_kubernetes_job() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="no YAML parser in this environment")
    return yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())


def test_the_kubernetes_job_is_a_trainjob() -> None:
    job = read_kubernetes_job()
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["kind"] == "TrainJob"
    spec = job["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    trainer = spec["trainer"]
    assert spec.keys() == FIELDS["spec"]
    assert trainer.keys() == FIELDS["trainer"]
    assert isinstance(trainer["numNodes"], int)
    gpus = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["numProcPerNode"] == gpus
    (patch,) = spec["runtimePatches"]
    assert patch.keys() == {"manager", "trainingRuntimeSpec"}
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # The names are the runtime's.
    assert node["name"] == container["name"] == "node"
    assert pod.keys() == FIELDS["pod"]
    assert container.keys() == FIELDS["container"]
    mounts = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    variables = {item["name"]: item["value"] for item in trainer["env"]}
    # These are Trainer's own to set.
    assert not any(name.startswith("PET_") for name in variables)
    assert all(isinstance(value, str) for value in variables.values())
    assert variables["RUN_DIR"].startswith(mounts["shared"])
    assert settings.parse(trainer["args"]).model == "60m"


def test_the_kubernetes_command_starts_torchrun(tmp_path: Path) -> None:
    """With what Trainer sets; a stand-in for Python prints its arguments."""
    trainer = read_kubernetes_job()["spec"]["trainer"]
    script = "/sharded_adadiag/launch/torchrun_static.sh"
    command = [
        part.replace(script, str(ROOT / script[17:])) for part in trainer["command"]
    ]
    assert command != trainer["command"]
    env = {
        **os.environ,
        **{item["name"]: item["value"] for item in trainer["env"]},
        **{"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8"},
        **{"PET_MASTER_ADDR": "adadiag-node-0-0.adadiag", "PET_MASTER_PORT": "29400"},
        "SHARDED_ADADIAG_PYTHON_ENV": str(stand_in(tmp_path, "python")),
    }
    done = subprocess.run(
        [*command, *trainer["args"]], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    for expected in (
        *("--nnodes=2", "--node-rank=1", "--nproc-per-node=8", "--resume"),
        *("--master-addr=adadiag-node-0-0.adadiag", "--master-port=29400"),
        *("examples/pretrain_llama.py", "/shared/runs/60m", *trainer["args"]),
    ):
        assert expected in arguments


def stand_in(folder: Path, name: str) -> Path:
    """An environment with a program that prints its arguments."""
    activate = folder / "bin/activate"
    activate.parent.mkdir()
    activate.write_text(f'PATH="{folder}:$PATH"\n')
    (folder / name).write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    "script",
    [
        "torchrun_static.sh",
        "torchrun_c10d.sh",
        "torchrun_elastic.sh",
        "deepspeed_hostfile.sh",
    ],
)
def test_a_missing_variable_is_named(script: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RUN_DIR"}
    env |= {"MASTER_ADDR": "node-0", "HOST": "node-0", "NODE_RANK": "0"}
    env["HOSTFILE"] = "hosts"
    done = subprocess.run(
        ["bash", f"launch/{script}"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "RUN_DIR" in done.stderr


@pytest.mark.parametrize(
    "where, expected",
    [
        ({}, ["--launcher", "pdsh", "--force_multi"]),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, ["--no_ssh", "--node_rank", "1"]),
    ],
)
def test_the_hostfile_goes_to_deepspeeds_launcher(
    where: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    """A stand-in for `deepspeed` prints its arguments."""
    stand_in(tmp_path, "deepspeed")
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    env = {**os.environ, **where, "SHARDED_ADADIAG_PYTHON_ENV": str(tmp_path)}
    env |= {"HOSTFILE": str(hosts), "RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        ["bash", "launch/deepspeed_hostfile.sh", "--steps", "7"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    script = arguments.index("examples/deepspeed/pretrain_llama.py")
    for expected_flag in (*expected, "--hostfile", str(hosts)):
        assert expected_flag in arguments[:script]
    config = arguments[arguments.index("--deepspeed_config") + 1]
    assert (ROOT / config).is_file()
    assert arguments[-4:] == [str(tmp_path / "run"), "--resume", "--steps", "7"]


def test_deepspeed_runs_a_script_of_yours_that_knows_the_optimizers(
    tmp_path: Path,
) -> None:
    hosts, script = tmp_path / "hosts", tmp_path / "mine.py"
    hosts.write_text("a slots=1\n")
    script.touch()
    env = {**os.environ, "HOSTFILE": str(hosts)}
    env["SHARDED_ADADIAG_PYTHON_ENV"] = str(stand_in(tmp_path, "deepspeed"))
    done = subprocess.run(
        ["bash", str(ROOT / "launch/deepspeed_hostfile.sh"), "mine.py", "--lr", "1"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = ["--module", "sharded_adadiag.run", str(script), "--lr", "1"]
    assert done.stdout.splitlines()[-5:] == expected


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_torchrun_without_ranks_is_ended() -> None:
    """Here torchrun is a program whose child runs for longer than the limit, then
    nothing; it must be ended after, not before, its child has ended.
    """
    program = (
        "import subprocess, time; subprocess.run(['sleep', '4']);"
        "print('the child has ended', flush=True); time.sleep(300)"
    )
    script = '. launch/end_when_idle.sh; end_when_idle $$ 2 & exec "$@"'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "bash", sys.executable]
        + ["-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "the child has ended\n"
    assert "no rank has run on this node for 2 s" in done.stderr
