"""The examples for DeepSpeed, as its users start them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.launching import free_port
from support.runs import EXAMPLES, STEPS, execute, flags, read_results, torchrun

# With a version: the folder of the examples passes for a package without one.
pytest.importorskip(
    "deepspeed", minversion="0.19", reason="the extra [deepspeed] is not installed"
)
FOLDER = EXAMPLES / "deepspeed"
ON_CPU = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed imports it, and nothing is compiled
}


def run(command: list[str]) -> str:
    """A command that must succeed; returns its output."""
    done = execute(command, **ON_CPU)
    assert done.returncode == 0, done.stdout
    return done.stdout


def config(stage: int, folder: Path) -> Path:
    """The example's config file for a run of a few steps, with three bases."""
    content = json.loads((FOLDER / f"ds_config_stage{stage}.json").read_text())
    content["train_batch_size"] = 8
    content["optimizer"]["params"]["refresh_every"] = 2
    content["scheduler"]["params"]["warmup_num_steps"] = 2
    path = folder / f"stage{stage}.json"
    path.write_text(json.dumps(content))
    return path


def arguments(stage: int, run_dir: Path) -> list[str]:
    """A tiny run; the config file says what the missing flags would."""
    given = flags(run_dir)
    place = given.index("--device")
    del given[place : place + 2]
    return ["--deepspeed_config", str(config(stage, run_dir.parent)), *given]


@pytest.mark.multiprocess
def test_a_run_under_stage_3_continues_as_if_uninterrupted(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    command = [*torchrun(2), str(FOLDER / "pretrain_llama.py")]
    output = run([*command, *arguments(3, whole)])
    assert "AdaDiag, ZeRO stage 3, world size 2 on cpu" in output
    assert (whole / "loss.png").stat().st_size > 0
    results = read_results(whole)
    assert [line["step"] for line in results] == list(range(1, STEPS + 1))
    assert results[-1]["val_loss"] < results[0]["loss"]

    # As a crash after the first checkpoint leaves it.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/step-6")
    (resumed / "checkpoints/latest").write_text("step-3")
    output = run([*command, *arguments(3, resumed), "--resume"])
    assert f"continuing from {resumed}/checkpoints/step-3" in output
    assert read_results(resumed) == results


# A user's script that says nothing of this package.
SCRIPT = """
import argparse, sys
import deepspeed, deepspeed.ops, torch

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--deepspeed_config")
args = parser.parse_args()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
engine, optimizer, *_ = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters()
)
data = torch.randn(4, 6, dtype=torch.bfloat16)
losses = []
for _ in range(6):
    loss = engine(data).float().square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
kind = type(optimizer.optimizer)
falls = losses[-1] < losses[0]
sys.stdout.write(f"{kind.__module__}.{kind.__name__} {args.local_rank} {falls}\\n")
"""


@pytest.mark.multiprocess
def test_a_script_that_does_not_import_the_package_finds_the_optimizer(
    tmp_path: Path,
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_port", str(free_port()), "--module", "sharded_adadiag.run"]
    output = run([
        *launcher,
        *(str(script), "--deepspeed_config", str(config(1, tmp_path))),
    ])
    for local_rank in (0, 1):
        assert f"sharded_adadiag.optimizer.AdaDiag {local_rank} True\n" in output


@pytest.mark.multiprocess
def test_the_trainer_takes_optimizer_and_schedule_from_the_config(
    tmp_path: Path,
) -> None:
    pytest.importorskip("accelerate", reason="the extra [examples] is not installed")
    run_dir = tmp_path / "run"
    program = str(FOLDER / "trainer.py")
    output = run([*torchrun(2), program, *arguments(3, run_dir)])
    assert "AdaDiag, ZeRO stage 3, world size 2" in output
    log = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    steps, (_, validation) = log[:STEPS], log[STEPS:]
    # The Trainer logs the rate of the next step: warm-up over two, then the peak.
    rates = [line["learning_rate"] for line in steps]
    assert rates == pytest.approx([1e-4, 1.55e-3, 3e-3, 3e-3, 3e-3, 3e-3])
    assert validation["eval_loss"] < steps[0]["loss"] - 0.02
