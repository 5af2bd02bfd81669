"""Thousands of steps on two ranks leave no memory, file, thread or object behind."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adadiag import AdaDiag, AdafacDiag, param_groups
from sharded_adadiag.testing.ranks import run_processes

STEPS, WARM_UP, EVERY, PERIOD = 2000, 1000, 25, 50
NEW_GRADIENTS = 25  # steps between backward passes, whose memory is FSDP's affair
# A tensor of one number left behind by every step makes 650 kB in the steps that count.
# The heap itself still grows, by blocks of 132 kB, mostly one or two: it does not stop
# before 5,000 steps. Objects are counted, which finds a leak in Python at once.
MOST_GROWTH = 450_000


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counted():
    """Open files, threads, and objects that the garbage collector knows."""
    gc.collect()
    files, threads = (len(os.listdir(f"/proc/self/{of}")) for of in ("fd", "task"))
    return files, threads, len(gc.get_objects())


def slope(xs, ys):
    """Of the line with the least squares through the points."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (xs, ys))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def small_model():
    return nn.Sequential(
        nn.Embedding(16, 8),
        nn.Linear(8, 24),
        nn.Tanh(),
        nn.Linear(24, 8),
        nn.Linear(8, 16),
    )


def soak(rank, make, leak=None):
    """Resident bytes and what was counted, after the warm-up."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(small_model(), mesh=mesh)
    opt = make(model)
    tokens = torch.arange(32) % 16
    steps, resident, counts = [], [], []
    gc.freeze()  # what is imported need not be searched again and again
    for step in range(STEPS):
        if step % NEW_GRADIENTS == 0:
            opt.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens).backward()
            grads = [param.grad.to_local() for param in model.parameters()]
        if step % NEW_GRADIENTS == NEW_GRADIENTS - 1:
            grads[-1].fill_(float("nan"))
        opt.step()
        if leak is not None:
            leak()
        if step >= WARM_UP and step % EVERY == 0:
            counts.append(counted())
            steps.append(step)
            resident.append(resident_bytes())
    return slope(steps, resident), resident[-1] - resident[0], counts


def adadiag(model):
    return AdaDiag(
        param_groups(model),
        refresh_every=PERIOD,
        distribution="owner",
        nonfinite="skip",
    )


def adafacdiag(model):
    return AdafacDiag(
        param_groups(model),
        refresh_every=PERIOD,
        distribution="broadcast",
        nonfinite="skip",
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("make", [adadiag, adafacdiag])
def test_long_runs_leave_nothing_behind(make):
    """Refreshes and skipped steps included."""
    for rank, (per_step, growth, counts) in enumerate(run_processes(2, soak, make)):
        print(f"rank {rank}: {per_step:.0f} bytes per step, {growth} in all")
        files, threads, objects = zip(*counts)
        assert set(files) == {files[0]}
        assert set(threads) == {threads[0]}
        assert objects[-1] - objects[0] < len(counts)  # a leak makes one in each step
        assert growth < MOST_GROWTH
