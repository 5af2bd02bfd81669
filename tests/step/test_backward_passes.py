"""Gradients of real backward passes, each rank with its part of the batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.ranks import run_processes, run_threads


class Widening(nn.Module):
    """A regression model whose gradients have full rank on the rotated side."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(8, 12, dtype=dtype)
        self.second = nn.Linear(12, 8, dtype=dtype)
        # Ranks that are threads share the global random state.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in self.parameters():
                param.uniform_(-0.3, 0.3, generator=generator)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def backward_steps(rank, world_size, layout, dtype, distribution):
    """Each rank sees its slice of the same global batch."""
    model = Widening(dtype)
    process_group = None
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model, mesh=mesh)
    opt = AdaDiag(
        model.parameters(),
        lr=1e-3,
        refresh_every=12,
        distribution=distribution,
        process_group=dist.group.WORLD if layout == "ddp" else process_group,
    )
    generator = torch.Generator().manual_seed(11)
    share = 96 // world_size
    for _ in range(30):
        x = torch.randn(96, 8, generator=generator, dtype=dtype)
        y = torch.randn(96, 8, generator=generator, dtype=dtype)
        mine = slice(rank * share, (rank + 1) * share)
        loss = (model(x[mine]) - y[mine]).square().mean()
        opt.zero_grad()
        loss.backward()
        if layout == "ddp":
            for param in model.parameters():
                dist.all_reduce(param.grad)
                param.grad /= world_size
        opt.step()
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


@pytest.mark.multiprocess
@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_real_backward_passes_on_gloo_processes_agree_to_1e_6(layout, distribution):
    check_backward(run_processes, 2, layout, distribution)


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize(
    "layout,world_size",
    [
        *(("fsdp2", world_size) for world_size in (1, 2, 3, 4, 8)),
        ("ddp", 2),
        ("ddp", 4),
    ],
)
def test_real_backward_passes_agree_to_1e_6(layout, world_size, distribution):
    check_backward(run_threads, world_size, layout, distribution)


def check_backward(run, world_size, layout, distribution):
    dtype = torch.float32
    want = backward_steps(0, 1, "single", dtype, "auto")
    got = run(world_size, backward_steps, world_size, layout, dtype, distribution)
    for weights in got:
        for a, b in zip(weights, want):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0.0)
