"""Real models in every way FSDP2 and its like can hold them, beside a plain optimizer.

A plain optimizer of one process follows each run: it gets the full gradients that the
ranks hold between them and must come to the same weights, bit for bit.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.block_model import (
    PERIOD,
    STEPS,
    WIDTH,
    Block,
    Follower,
    Model,
    build,
    fill,
    fsdp1,
    loss_of,
    make,
    mesh_of,
    train,
    wrapped,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.testing.ranks import run_processes, run_threads


def mixed_precision(rank: int) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    model = wrapped(build(), mp_policy=policy)
    train(rank, model, make(model))


def bfloat16_parameters(rank: int) -> None:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    model = wrapped(build().bfloat16(), mp_policy=policy)
    train(rank, model, make(model, state_dtype=torch.float32))


def cpu_offload(rank: int) -> None:
    model = wrapped(build(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(rank, model, make(model))


def kept_unsharded(rank: int) -> None:
    model = wrapped(build(), reshard_after_forward=False)
    train(rank, model, make(model))


def resharded_to_fewer(rank: int) -> None:
    model = wrapped(build(), reshard_after_forward=2)
    train(rank, model, make(model))


def hybrid(rank: int) -> None:
    model = wrapped(build(), mesh=mesh_of(2, dist.get_world_size() // 2))
    train(rank, model, make(model))


def sharded_columns(rank: int) -> None:
    def place(param: nn.Parameter) -> Shard | None:
        even = param.dim() > 1 and param.shape[1] % dist.get_world_size() == 0
        return Shard(1) if even else None

    model = wrapped(build(), shard_placement_fn=place)
    assert model.head.weight.placements == (Shard(1),)
    train(rank, model, make(model))


def meta_initialisation(rank: int) -> None:
    """The optimizer is made while the parameters have neither storage nor values."""
    with torch.device("meta"):
        model = Model()
    wrapped(model)
    opt = make(model)
    model.to_empty(device="cpu")
    fill(model)
    train(rank, model, opt)


def accumulation(rank: int) -> None:
    def backward(model: Any, rank: int, step: int) -> None:
        for part in range(3):
            model.set_requires_gradient_sync(part == 2)
            loss_of(model, rank, 10 * step + part).backward()

    model = wrapped(build())
    train(rank, model, make(model), backward=backward)


def clipping(rank: int) -> None:
    def backward(model: nn.Module, rank: int, step: int) -> None:
        loss_of(model, rank, step).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert float(norm.full_tensor()) > 0.01

    model = wrapped(build())
    train(rank, model, make(model), backward=backward)


def several_roots(rank: int) -> None:
    """Parts that are sharded apart, on meshes of their own: no common root."""
    model = build()
    fully_shard(model.blocks[0], mesh=mesh_of(dist.get_world_size()))
    fully_shard(model.blocks[1], mesh=mesh_of(2, dist.get_world_size() // 2))
    fully_shard(model.shared_expert, mesh=mesh_of(dist.get_world_size()))

    def backward(model: nn.Module, rank: int, step: int) -> None:
        loss_of(model, rank, step).backward()
        for param in model.parameters():
            if param.grad is not None and not isinstance(param, DTensor):
                dist.all_reduce(param.grad)

    train(rank, model, make(model), backward=backward)


def tied_weights(rank: int) -> None:
    model = build(tied=True)
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    train(rank, model, make(model))


def tensor_parallel(rank: int) -> None:
    model = build()
    parallelize(model, mesh_of(dist.get_world_size()))
    # Every rank of a tensor-parallel group sees the same batch.
    train(0, model, make(model))


def tensor_parallel_under_fsdp(rank: int) -> None:
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp")
    )
    model = build()
    parallelize(model, mesh["tp"])
    wrapped(model, mesh=mesh["dp"])
    train(mesh.get_local_rank("dp"), model, make(model))


def parallelize(model: Model, mesh: DeviceMesh) -> None:
    for block in [*model.blocks, model.shared_expert]:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)


def pipeline_stages(rank: int) -> None:
    """Each stage has parameters of its own and a group of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage = mesh.get_local_rank("stage")
    model = nn.Sequential(Block(), *([nn.Linear(WIDTH, 5)] if stage else []))
    fill(model)
    fully_shard(model, mesh=mesh["shard"])

    def backward(model: nn.Module, rank: int, step: int) -> None:
        generator = torch.Generator().manual_seed(100 * step + rank)
        model(torch.randn(9, WIDTH, generator=generator)).square().sum().backward()

    groups = [mesh["shard"].get_group(), None]  # its own is what the mesh tells too
    for group in groups:
        opt = AdaDiag(
            param_groups(model),
            lr=1e-2,
            refresh_every=PERIOD,
            distribution="owner",
            process_group=group,
        )
        train(rank, model, opt, backward=backward)


def ddp_everything_everywhere(rank: int) -> None:
    # (Ranks that are threads of one process cannot share DDP's reducer.)
    model = DistributedDataParallel(build(), find_unused_parameters=True)
    train(rank, model, make(model))


def ddp_sharded(rank: int) -> None:
    model = DistributedDataParallel(
        build(), find_unused_parameters=True, gradient_as_bucket_view=True
    )
    train(rank, model, make(model, process_group=dist.group.WORLD))


def zero_redundancy(rank: int) -> None:
    """torch's own sharding over DDP works too; it sends weights, not updates."""
    # Imported here because the import warns of a deprecation inside torch.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(build(), find_unused_parameters=True)
    opt = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=AdaDiag,
        lr=1e-2,
        weight_decay=0.1,
        refresh_every=PERIOD,
    )
    plain = AdaDiag(model.parameters(), lr=1e-2, weight_decay=0.1, refresh_every=PERIOD)
    follower = Follower(plain, None)
    for step in range(STEPS):
        opt.zero_grad()
        loss_of(model, rank, step).backward()
        follower.step()
        opt.step()
        follower.compare()


IN_THREADS = [
    mixed_precision,
    bfloat16_parameters,
    cpu_offload,
    kept_unsharded,
    resharded_to_fewer,
    hybrid,
    sharded_columns,
    meta_initialisation,
    accumulation,
    clipping,
    several_roots,
    tied_weights,
    tensor_parallel,
    tensor_parallel_under_fsdp,
    pipeline_stages,
]


@pytest.mark.parametrize("layout", IN_THREADS, ids=lambda f: f.__name__)
def test_the_weights_are_those_of_one_process(layout):
    run_threads(4, layout)


def all_of_fsdp1(rank: int) -> None:
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
        model = fsdp1(strategy)
        train(rank, model, make(model))


def hybrid_fsdp1(rank: int) -> None:
    model = fsdp1("HYBRID_SHARD", mesh_of(2, 2))
    train(rank, model, make(model))


def unsharded_fsdp1(rank: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch: use DDP instead
        model = fsdp1("NO_SHARD")
    train(rank, model, make(model))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "layout,world_size",
    [
        (all_of_fsdp1, 2),
        (hybrid_fsdp1, 4),
        (unsharded_fsdp1, 2),
        (ddp_everything_everywhere, 2),
        (ddp_sharded, 2),
        (zero_redundancy, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_weights_are_those_of_one_process_on_gloo(layout, world_size):
    run_processes(world_size, layout)
