"""Scalers, hooks and other callers of step(), and what they may not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.block_model import build, fsdp1, loss_of, make, mesh_of, train, wrapped
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.testing.ranks import run_processes, run_threads


def weights(model: nn.Module) -> list[torch.Tensor]:
    """This rank's shards."""
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [shard.detach().clone() for shard in shards]


def overflowing(rank: int, model: nn.Module, scaler: GradScaler, **options: Any) -> int:
    """Three scaled steps, the second with an inf on rank 0 only; returns how many."""
    opt = make(model, **options)
    steps = 0
    for step in range(3):
        before = weights(model)
        opt.zero_grad()
        scaler.scale(loss_of(model, rank, step)).backward()
        if step == 1 and rank == 0:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            shards = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
            next(g for g in shards if g.numel()).view(-1)[0] = float("inf")
        scaler.step(opt)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, weights(model)))
        assert same == (step == 1), (rank, step)
        steps += not same
    return steps


def fsdp2_scaler(rank: int) -> int:
    return overflowing(rank, wrapped(build()), GradScaler("cpu", init_scale=16.0))


def hsdp_scaler(rank: int) -> int:
    model = wrapped(build(), mesh=mesh_of(2, 2))
    if rank in (0, 2):  # replicas have the same gradients: both get the inf
        return overflowing(0, model, GradScaler("cpu", init_scale=16.0))
    return overflowing(1, model, GradScaler("cpu", init_scale=16.0))


@pytest.mark.parametrize("body,ranks", [(fsdp2_scaler, 3), (hsdp_scaler, 4)])
def test_an_overflow_on_one_rank_skips_the_step_on_all(body, ranks):
    assert run_threads(ranks, body) == [2] * ranks


def fsdp1_sharded_scaler(rank: int) -> int:
    return overflowing(rank, fsdp1(), ShardedGradScaler("cpu", init_scale=16.0))


def fsdp1_plain_scaler(rank: int) -> str:
    model, scaler = fsdp1(), GradScaler("cpu")
    opt = make(model)
    scaler.scale(loss_of(model, rank, 0)).backward()
    with pytest.raises(RuntimeError) as caught:
        scaler.step(opt)
    return str(caught.value)


def fsdp1_without_reduction(rank: int) -> str:
    model: Any = fsdp1()
    opt = make(model)
    with model.no_sync():
        loss_of(model, rank, 0).backward()
    before = weights(model)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    return str(caught.value)


def on_fsdp1(rank: int) -> tuple[int, str, str]:
    return (
        fsdp1_sharded_scaler(rank),
        fsdp1_plain_scaler(rank),
        fsdp1_without_reduction(rank),
    )


@pytest.mark.multiprocess
def test_fsdp1_takes_the_sharded_scaler_and_reduced_gradients_only():
    for steps, plain, unreduced in run_processes(2, on_fsdp1):
        assert steps == 2
        assert "GradScaler" in plain and "ShardedGradScaler" in plain
        assert "not that rank's shard" in unreduced and "no_sync" in unreduced


def ddp_scaler(rank: int) -> int:
    model = DistributedDataParallel(build(), find_unused_parameters=True)
    scaler = GradScaler("cpu", init_scale=16.0)
    # All ranks have the same gradients under DDP, an inf included.
    return overflowing(0, model, scaler, process_group=dist.group.WORLD)


@pytest.mark.multiprocess
def test_ddp_takes_the_plain_scaler():
    assert run_processes(2, ddp_scaler) == [2, 2]


def test_a_scaler_works_in_one_process():
    assert overflowing(0, build(), GradScaler("cpu", init_scale=16.0)) == 2


def test_a_step_inside_the_backward_pass_is_refused_with_the_reason():
    model = build()
    opts = {
        p: AdaDiag([p]) for group in param_groups(model) for _, p in group["params"]
    }
    for param in opts:
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda p: opts[p].step())
    with pytest.raises(RuntimeError, match=r"inside a backward pass.*after backward"):
        loss_of(model, 0, 0).backward()


def test_a_closure_may_run_the_backward_pass():
    model = build()
    opt = make(model)

    def closure() -> float:
        opt.zero_grad()
        loss = loss_of(model, 0, 0)
        loss.backward()
        return float(loss.detach())

    assert opt.step(closure) > opt.step(closure)


def unlike_replicas(rank: int) -> str:
    model = build()
    with torch.no_grad():
        model.head.weight += rank  # nobody has broadcast the weights
    opt = make(model, process_group=dist.group.WORLD)
    loss_of(model, 0, 0).backward()
    before = weights(model)
    with pytest.raises(ValueError) as caught:
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    return str(caught.value)


def test_replicas_that_are_none_are_refused_by_name():
    messages = set(run_threads(3, unlike_replicas))
    assert len(messages) == 1
    assert "head.weight: ranks 0 and 1 hold the same part" in messages.pop()


def gathered_module(rank: int) -> str:
    model = wrapped(build(), reshard_after_forward=False)
    loss_of(model, rank, 0)
    with pytest.raises(RuntimeError) as caught:
        param_groups(model)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    train(rank, model, make(model))
    return str(caught.value)


def test_an_optimizer_of_gathered_parameters_is_refused():
    for message in run_threads(2, gathered_module):
        assert "fully_shard has gathered" in message and "reshard()" in message


def stage_of_a_pipeline(rank: int) -> str:
    """Two stages, each on a 2-D mesh of its own."""
    mesh = init_device_mesh(
        "cpu", (2, 2, 2), mesh_dim_names=("stage", "replicate", "shard")
    )
    own = mesh["replicate", "shard"]
    model = wrapped(build(), mesh=own)
    opt = make(model)
    loss_of(model, rank, 0).backward()
    with pytest.raises(ValueError) as caught:
        opt.step()
    first = rank // 4 * 4
    groups = [dist.new_group(range(start, start + 4)) for start in (0, 4)]
    train(rank, model, make(model, process_group=groups[first // 4]))
    return str(caught.value)


def test_a_pipeline_stage_on_a_2d_mesh_needs_a_group_and_works_with_one():
    messages = run_threads(8, stage_of_a_pipeline)
    assert "ranks [0, 1, 2, 3] of 8" in messages[0] and "process_group=" in messages[0]
    assert "ranks [4, 5, 6, 7] of 8" in messages[7]


def frozen_on_one_rank(rank: int) -> str:
    model = wrapped(build())
    if rank == 1:
        model.requires_grad_(False)
    with pytest.raises(ValueError) as caught:
        make(model).describe()
    return str(caught.value)


def test_a_rank_that_trains_nothing_is_told_with_the_others():
    messages = set(run_threads(2, frozen_on_one_rank))
    assert len(messages) == 1 and "rank 1 has 0" in messages.pop()
