"""A few parameters in two groups, in every layout, whose groups are edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.ranks import run_threads
from support.block_model import mesh_of

SHAPES = {"wide": (5, 8), "tall": (8, 5), "router": (4, 6), "bias": (7,)}


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator)))
        for name, shape in SHAPES.items()
    ]


def step(opt: torch.optim.Optimizer, named: list[tuple[str, Any]], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for name, param in named:
        grad = torch.randn(SHAPES[name], generator=generator)
        if isinstance(param, DTensor):
            grad = placed(grad, param.device_mesh, param.placements)
        param.grad = grad
    opt.step()


def placed(value: Tensor, mesh: DeviceMesh, places: Any) -> Tensor:
    return distribute_tensor(value, mesh, places, src_data_rank=None)


def values(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in named
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def replace(opt: torch.optim.Optimizer, new: Callable[[Tensor], Tensor]) -> None:
    """As accelerate does it: first by placeholders, then by what was made of them."""
    places = [(g, i) for g in opt.param_groups for i in range(len(g["params"]))]
    made = {(id(g), i): new(g["params"][i]) for g, i in places}
    for group, i in places:
        group["params"][i] = torch.empty(1)
    for group in opt.param_groups:
        group["params"] = [made[id(group), i] for i in range(len(group["params"]))]


def twin(param: Tensor) -> nn.Parameter:
    return nn.Parameter(param.detach().clone(), param.requires_grad)


def plain(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    named = parameters()
    return make_groups(named, **options), named


def sharded(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    mesh = mesh_of(dist.get_world_size())
    named: list[tuple[str, Any]] = [
        (name, nn.Parameter(placed(p.detach(), mesh, [Shard(0)])))
        for name, p in parameters()
    ]
    return make_groups(named, **options), named


def columns(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    """Replicas of shards, as HSDP has them, by columns, as tensor parallel has them."""
    mesh = mesh_of(2, 2)
    named: list[tuple[str, Any]] = []
    for name, p in parameters():
        places = [Replicate(), Shard(p.dim() - 1)]
        named.append((name, nn.Parameter(placed(p.detach(), mesh, places))))
    return make_groups(named, **options), named


def replicas(rank: int, **options: Any) -> tuple[AdaDiag, list[tuple[str, Any]]]:
    """As under DDP."""
    return plain(rank, process_group=dist.group.WORLD, **options)


def make_groups(
    named: list[tuple[str, Any]], cls: type = AdaDiag, **options: Any
) -> AdaDiag:
    groups = [{"params": named[:1]}, {"params": named[1:], "lr": 1e-2}]
    return cls(groups, **{"lr": 1e-2, "refresh_every": 2, **options})


Make = Callable[..., tuple[AdaDiag, list[tuple[str, Any]]]]

OWNER, BROADCAST = {"distribution": "owner"}, {"distribution": "broadcast"}

LAYOUTS: dict[str, tuple[int, Make, dict[str, Any]]] = {
    "one process": (1, plain, {}),
    "fsdp2, owner": (2, sharded, OWNER),
    "fsdp2, broadcast": (2, sharded, BROADCAST),
    "hsdp, tp": (4, columns, OWNER),
    "ddp": (2, replicas, OWNER),
}


def on_ranks(layout: str, body: Callable[..., Any], *args: Any) -> list[Any]:
    ranks, make, options = LAYOUTS[layout]
    if ranks == 1:
        return [body(0, make, options, *args)]
    return run_threads(ranks, body, make, options, *args)
