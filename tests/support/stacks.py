"""Stacks of matrices and fused projections in every layout, and matrix by matrix."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sharded_adadiag import param_groups
from support.training import CLASSES, local_gradient, plain_names, whole

SHAPES = {"experts": (5, 6, 9), "down": (5, 9, 4), "fused": (13, 8), "bias": (8,)}
STACKS, ROWS = ("experts", "down"), [6, 3, 4]
# Experts without a token, whose gradients are zeros, and in which steps.
IDLE = {1: range(4), 2: range(3, 7)}
PERIOD = 3
# Ranks, mesh and placements; of a parameter of two dimensions the last one counts.
LAYOUTS: dict[str, tuple[int, tuple[int, ...], tuple[Any, ...]]] = {
    "one process": (1, (), ()),
    "rows of 2": (2, (2,), (Shard(0),)),
    "rows of 3": (3, (3,), (Shard(0),)),
    "dimension 1": (2, (2,), (Shard(1),)),
    "dimension 2": (3, (3,), (Shard(2),)),
    "hsdp": (4, (2, 2), (Replicate(), Shard(0))),
    "rows, then dimension 1": (4, (2, 2), (Shard(0), Shard(1))),
    "rows, then dimension 2": (4, (2, 2), (Shard(0), Shard(2))),
    "ddp": (3, (), ()),
    "fsdp1": (3, (), ()),
}


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            generator = torch.Generator().manual_seed(len(name))
            weight = torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(weight))


def gradient(name: str, step: int, idle: dict[int, range] = IDLE) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name))
    grad = torch.randn(SHAPES[name], generator=generator)
    for expert, steps in idle.items() if name in STACKS else ():
        if step in steps:
            grad[expert] = 0.0
    return grad


def placed(layout: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model on this rank, and what its optimizer must be told."""
    model = Stacked()
    _, mesh_shape, places = LAYOUTS[layout]
    if layout == "ddp":
        return model, {"process_group": dist.group.WORLD}
    if layout == "fsdp1":
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True), {}
    if mesh_shape:
        mesh = init_device_mesh("cpu", mesh_shape)
        for name, param in list(model.named_parameters()):
            last = param.dim() - 1
            own = [Shard(min(p.dim, last)) if p.is_shard() else p for p in places]
            if own == [Shard(0), Shard(0)]:
                own[0] = Replicate()
            shard = distribute_tensor(param.detach(), mesh, own, src_data_rank=None)
            setattr(model, name, nn.Parameter(shard))
    return model, {}


def optimizer(model: nn.Module, method: str, **options: Any) -> Any:
    param_groups(model)  # lets the optimizer know of FSDP1's flat pieces
    named = list(plain_names(model).items())
    by_name = {name: (name, param) for name, param in named}
    groups = [
        {"params": [by_name[n] for n in STACKS], "rotate": True, "batch_dims": 1},
        {"params": [by_name["fused"]], "rotate": True, "split_rows": ROWS},
        {"params": [by_name["bias"]], "rotate": False},
    ]
    how = {"lr": 1e-2, "weight_decay": 0.1, "refresh_every": PERIOD, **options}
    return CLASSES[method](groups, **how)


def advance(
    model: nn.Module,
    opt: Any,
    start: int,
    stop: int,
    idle: dict[int, range] = IDLE,
) -> None:
    for step in range(start, stop):
        for name, param in plain_names(model).items():
            local = local_gradient(param, gradient(name, step, idle))
            param.grad = local if local.numel() else None
        opt.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p).detach().clone() for n, p in plain_names(model).items()}


def by_matrix(
    method: str, steps: int, idle: dict[int, range] = IDLE, **options: Any
) -> dict[str, Tensor]:
    """The same run in one process, with a parameter for each matrix."""
    parts = {name: _apart(name, p.detach()) for name, p in Stacked().named_parameters()}
    matrices = {
        (name, i): nn.Parameter(part.clone())
        for name, some in parts.items()
        for i, part in enumerate(some)
    }
    rotated = [p for (name, _), p in matrices.items() if name != "bias"]
    groups = [
        {"params": rotated, "rotate": True},
        {"params": [matrices["bias", 0]], "rotate": False},
    ]
    how = {"lr": 1e-2, "weight_decay": 0.1, "refresh_every": PERIOD, **options}
    opt = CLASSES[method](groups, **how)
    for step in range(steps):
        for name in SHAPES:
            for i, grad in enumerate(_apart(name, gradient(name, step, idle))):
                matrices[name, i].grad = grad.clone()
        opt.step()
    return {
        name: torch.cat([
            matrices[name, i].detach().reshape(-1) for i in range(len(parts[name]))
        ]).view(shape)
        for name, shape in SHAPES.items()
    }


def _apart(name: str, tensor: Tensor) -> list[Tensor]:
    if name in STACKS:
        return list(tensor.unbind())
    return list(tensor.split(ROWS)) if name == "fused" else [tensor]
