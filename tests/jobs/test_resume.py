"""The pretraining example on several ranks: runs, checkpoints and continuations."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from support.runs import (
    EXAMPLE,
    QUICK,
    STEPS,
    assert_same_end,
    command,
    environment,
    read_losses,
    read_results,
    run,
)

from sharded_adadiag.testing.ranks import run_processes

# runs has put the examples on the path
import checkpoints  # isort: skip
import metrics  # isort: skip
import pretrain_llama  # isort: skip
import ranks  # isort: skip
import settings  # isort: skip

# ------------------------------------------------------------- the saver itself


def test_half_written_checkpoints_are_not_picked_up(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-11.writing", "step-12.removing"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoints.newest(tmp_path).name == "step-10"
    assert checkpoints.newest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "content, message", [({"format": 99}, "has format 99"), (None, "has no run.pt")]
)
def test_a_checkpoint_of_another_version_is_refused(
    content: dict | None, message: str, tmp_path: Path
) -> None:
    if content:
        torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=f"{message}, this program reads format 1"):
        checkpoints.read_run(tmp_path)


def test_random_numbers_continue_and_new_ranks_have_their_own() -> None:
    cpu = torch.device("cpu")

    def draw(rank: int, seed: list[int]) -> list[float]:
        checkpoints.restore_random(saved, rank=rank, seed=seed, device=cpu)
        return torch.rand(3).tolist()

    with torch.random.fork_rng():
        torch.manual_seed(5)
        saved = [checkpoints.random_state(cpu)]
        expected = torch.rand(3).tolist()
        assert draw(0, [7, 3]) == expected
        new = [draw(rank, [7, step]) for rank in (1, 2) for step in (3, 4)]
        assert [draw(rank, [7, step]) for rank in (1, 2) for step in (3, 4)] == new
        assert len({tuple(numbers) for numbers in [expected, *new]}) == 5


def open_saver(rank: int, world_size: int, folder: Path) -> tuple:
    """A saver, and something to save, on a rank of `run_processes`."""
    cpu = torch.device("cpu")
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    here = ranks.Ranks(rank, rank, world_size, cpu, mesh)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = checkpoints.Saver(folder, here, keep_last=2, timeout_s=60.0)
    return saver, model, optimizer


def save_while_training(rank: int, folder: Path) -> dict[str, list]:
    """Weights when a save began, and after reading it; what was there meanwhile."""
    saver, model, optimizer = open_saver(rank, 2, folder)
    written = threading.Event()
    real = torch.distributed.checkpoint.FileSystemWriter.write_data

    def slow(*args):
        written.wait()
        return real(*args)

    torch.distributed.checkpoint.FileSystemWriter.write_data = slow
    before = [p.to_local().tolist() for p in model.parameters()]
    saver.save(1, model, optimizer, {"who": rank})
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()  # training has gone on
    meanwhile = [checkpoints.newest(folder), saver.failed]
    written.set()
    saver.wait()
    newest = checkpoints.newest(folder)
    saver.load(newest, model, optimizer)
    after = [p.to_local().tolist() for p in model.parameters()]
    for step in (2, 3):
        saver.save(step, model, optimizer, {"who": rank})
    saver.wait()
    kept = sorted(path.name for path in newest.parent.iterdir())
    return {
        "before": before,
        "meanwhile": meanwhile,
        "after": after,
        "who": checkpoints.read_run(newest.with_name("step-3"))["who"],
        "kept": kept,
    }


@pytest.mark.multiprocess
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step-7.writing"
    leftover.mkdir(parents=True)
    for result in run_processes(2, save_while_training, tmp_path):
        assert result["meanwhile"] == [None, False]
        assert result["after"] == result["before"]
        assert any(result["before"])
        assert result["who"] == 0
        assert result["kept"] == ["step-2", "step-3"]


def save_on_a_full_disk(rank: int, folder: Path) -> list[str]:
    """The messages of a failing save, by way of the step loop and of `wait`."""
    saver, model, optimizer = open_saver(rank, 2, folder)
    saver.save(1, model, optimizer, {})
    saver.wait()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        torch.distributed.checkpoint.FileSystemWriter.write_data = full
    messages = []
    for check in (saver.settle, lambda: None):
        saver.save(2, model, optimizer, {})
        check()
        try:
            if check == saver.settle:
                assert saver.failed
                saver.raise_failure()
            else:
                saver.wait()
        except RuntimeError as error:
            messages.append(str(error))
        saver._saving = None
    return messages


@pytest.mark.multiprocess
def test_a_full_disk_on_one_rank_is_one_error_on_all(tmp_path: Path) -> None:
    for messages in run_processes(2, save_on_a_full_disk, tmp_path):
        for message in messages:
            assert message.startswith("the checkpoint of step 2 could not be written: ")
            assert "rank 1: OSError: [Errno 28] No space left on device" in message
            assert message.endswith("step-1")
        assert len(messages) == 2
    assert checkpoints.newest(tmp_path).name == "step-1"


def test_a_failed_save_ends_the_training_after_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without waiting for the next checkpoint."""

    def raise_failure() -> None:
        raise RuntimeError("no room")

    def train_step(run: types.SimpleNamespace, watch: metrics.Stopwatch) -> float:
        run.step += 1
        return 1.0

    monkeypatch.setattr(pretrain_llama, "train_step", train_step)
    run = types.SimpleNamespace(
        settings=settings.parse(["--model", "tiny"]),
        ranks=types.SimpleNamespace(
            device=torch.device("cpu"), world_size=1, sum=lambda *values: list(values)
        ),
        saver=types.SimpleNamespace(failed=True, raise_failure=raise_failure),
        schedule=types.SimpleNamespace(get_last_lr=lambda: [0.1]),
        step=2,
    )
    with pytest.raises(RuntimeError, match="no room"):
        pretrain_llama.train(run, ranks.StopRequest(), None)
    assert run.step == 3


# ---------------------------------------------------------------- whole runs

ROTATED = ["--optimizer", "adadiag", "--refresh-every", "2"]


@pytest.fixture(scope="module")
def adamw_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example itself, on two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("adamw") / "whole"
    output = run(2, folder, "--optimizer", "adamw", program=EXAMPLE)
    assert str(folder / "loss.png") in output
    return folder


@pytest.fixture(scope="module")
def adadiag_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases of step 3 serve step 4; step 5 makes new ones."""
    folder = tmp_path_factory.mktemp("adadiag") / "whole"
    output = run(2, folder, *ROTATED)
    assert output.count("not rotated: ") == 1  # said by one rank
    return folder


def crashed(whole: Path, name: str) -> Path:
    """A copy of a run, as a crash during the writing of its last checkpoint left it."""
    folder = whole.parent / name
    shutil.copytree(whole, folder)
    last = folder / "checkpoints" / f"step-{STEPS}"
    last.rename(last.with_name(f"step-{STEPS}.writing"))
    return folder


@pytest.mark.multiprocess
@pytest.mark.xdist_group("adamw")
def test_a_run_leaves_metrics_and_a_plot(adamw_run: Path) -> None:
    results = read_results(adamw_run)
    assert [line["step"] for line in results] == list(range(1, STEPS + 1))
    assert [line["val_loss"] is not None for line in results] == [
        False,
        False,
        True,
    ] * 2
    assert results[-1]["loss"] < results[0]["loss"]
    assert results[-1]["tokens"] == STEPS * 8 * 32
    assert (adamw_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((adamw_run / "tensorboard").glob("events.*"))


@pytest.mark.multiprocess
@pytest.mark.xdist_group("adamw")
def test_a_resumed_run_repeats_the_uninterrupted_one(adamw_run: Path) -> None:
    resumed = crashed(adamw_run, "resumed")
    output = run(2, resumed, "--optimizer", "adamw", "--resume", program=EXAMPLE)
    assert f"continuing from {resumed}/checkpoints/step-3" in output
    assert_same_end(resumed, adamw_run)
    names = sorted(p.name for p in (resumed / "checkpoints").iterdir())
    assert names == ["step-3", f"step-{STEPS}"]


@pytest.mark.multiprocess
@pytest.mark.xdist_group("adamw")
def test_adamw_goes_on_on_fewer_ranks(adamw_run: Path) -> None:
    one = crashed(adamw_run, "one")
    more = ["--optimizer", "adamw", "--micro-batch", "8", "--resume"]
    assert "2 ranks wrote it, 1 go on" in run(1, one, *more, program=EXAMPLE)
    expected = read_losses(adamw_run)
    torch.testing.assert_close(read_losses(one), expected, rtol=1e-5, atol=0.0)


@pytest.mark.multiprocess
@pytest.mark.xdist_group("adadiag")
def test_a_resumed_run_repeats_its_rotations(adadiag_run: Path) -> None:
    resumed = crashed(adadiag_run, "resumed")
    run(2, resumed, *ROTATED, "--resume")
    assert_same_end(resumed, adadiag_run)


@pytest.mark.multiprocess
@pytest.mark.xdist_group("adadiag")
def test_one_rank_trains_like_two_and_two_go_on_from_it(
    adadiag_run: Path, tmp_path: Path
) -> None:
    """The same weights, bases and batches; only the order of sums differs."""
    one = tmp_path / "one"
    run(1, one, *ROTATED)
    expected = read_losses(adadiag_run)
    torch.testing.assert_close(read_losses(one), expected, rtol=1e-5, atol=0.0)
    two = crashed(one, "two")
    assert "1 ranks wrote it, 2 go on" in run(2, two, *ROTATED, "--resume")
    torch.testing.assert_close(read_losses(two), expected, rtol=1e-5, atol=0.0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_leaves_a_checkpoint(num_ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--optimizer", "adamw", "--steps", "1000000", "--save-every", "0"]
    process = subprocess.Popen(
        command(num_ranks, folder, *more, program=QUICK),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        give_up = time.monotonic() + 90
        while len(metrics.read_lines(folder / "metrics.jsonl")) < 3:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    # torchrun has an exit code of its own.
    assert process.returncode == (130 if num_ranks == 1 else 1)
    last = metrics.read_lines(folder / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}; continue with" in output
    checkpoint = checkpoints.newest(folder)
    assert checkpoints.step_of(checkpoint) == last
    assert checkpoints.read_run(checkpoint)["settings"]["optimizer"] == "adamw"
