"""Models made of the table of hard cases: in every layout, and trained."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, param_groups
from sharded_adadiag.params.fsdp1 import remembered
from sharded_adadiag.testing.cases import (
    Case,
    gradients,
    weights,
)

CLASSES = {"AdaDiag": AdaDiag, "AdafacDiag": AdafacDiag, "HfacDiag": HfacDiag}

STEPS, PERIOD = 30, 12  # refreshes at steps 1, 13 and 25


class Parameters(nn.Module):
    def __init__(self, cases: tuple[Case, ...], dtype: torch.dtype) -> None:
        super().__init__()
        for case, weight in zip(cases, weights(cases, dtype)):
            param = nn.Parameter(weight, requires_grad=not case.frozen)
            self.register_parameter(case.name, param)


def plain_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("_fsdp_wrapped_module."): param
        for name, param in model.named_parameters()
    }


def groups(model: nn.Module, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    param_groups(model)  # lets the optimizer know of FSDP1's flat pieces
    named = plain_names(model)
    pairs = [(c, (c.name, named[c.name])) for c in cases]
    both = [
        {"params": [pair for c, pair in pairs if c.rotate == rotate], "rotate": rotate}
        for rotate in (True, False)
    ]
    return [group for group in both if group["params"]]


def train(
    model: nn.Module,
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    method: str,
    options: dict[str, Any],
    steps: int = STEPS,
) -> tuple[list[Tensor], Any]:
    opt = CLASSES[method](
        groups(model, cases),
        lr=1e-2,
        weight_decay=0.1,
        refresh_every=PERIOD,
        **options,
    )
    advance(model, opt, cases, dtype, 0, steps)
    return whole_weights(model, cases), opt


def advance(
    model: nn.Module,
    opt: Any,
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    start: int,
    stop: int,
) -> None:
    named = plain_names(model)
    for step in range(start, stop):
        for case, grad in zip(cases, gradients(cases, step, dtype)):
            param = named[case.name]
            if case.frozen or case.without_gradient:
                continue
            local = local_gradient(param, grad)
            # FSDP1 gives an empty piece no gradient.
            param.grad = local if local.numel() or isinstance(local, DTensor) else None
        opt.step()


def whole_weights(model: nn.Module, cases: tuple[Case, ...]) -> list[Tensor]:
    named = plain_names(model)
    with torch.no_grad():
        return [whole(named[case.name]).clone() for case in cases]


def sharded_model(
    layout: str, cases: tuple[Case, ...], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    model = Parameters(cases, dtype)
    size = dist.get_world_size()
    if layout == "ddp":
        return model, {"process_group": dist.group.WORLD}
    if layout == "fsdp1":
        # With a mesh its state dicts have DTensors, without one ShardedTensors.
        model = FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            device_mesh=init_device_mesh("cpu", (size,)),
        )
        return model, {}
    if layout == "hsdp":
        mesh = init_device_mesh(
            "cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")
        )
        return fully_shard(model, mesh=mesh), {}
    if layout == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (size,))), {}
    if layout == "fsdp2+tp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        return fully_shard(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"]), {}
    return fully_shard(model, mesh=init_device_mesh("cpu", (size,))), {}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """What Colwise and Rowwise parallel styles leave: Shard(0), Shard(1), or whole."""
    for i, (name, param) in enumerate(list(model.named_parameters())):
        if param.dim() < 2 or param.shape[i % 2] % mesh.size() != 0:
            continue  # as norms: plain under tensor parallelism, which divides evenly
        placement = Shard(i % 2)
        shard = distribute_tensor(param.detach(), mesh, [placement], src_data_rank=None)
        setattr(model, name, nn.Parameter(shard, requires_grad=param.requires_grad))
    return model


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """A rank's part of a full gradient."""
    if isinstance(param, DTensor):
        return distribute_tensor(
            grad, param.device_mesh, param.placements, src_data_rank=None
        )
    flat = remembered(param, "")
    if flat is None:
        return grad
    return grad.reshape(-1)[flat[1].start : flat[1].stop].clone()


def whole(param: Tensor) -> Tensor:
    """The full parameter."""
    if isinstance(param, DTensor):
        mesh, none = param.device_mesh, [Replicate()] * param.device_mesh.ndim
        return param.redistribute(mesh, none).to_local()
    flat = remembered(param, "")
    if flat is None:
        return param
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, param.detach())
    return join(pieces, flat[0])


def join(pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The flat pieces of all ranks put together; replicas come again at the end."""
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    return flat[: torch.Size(shape).numel()].view(shape)


def weights_of(
    rank: int,
    layout: str,
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    method: str,
    options: dict[str, Any],
) -> list[Tensor]:
    model, extra = sharded_model(layout, cases, dtype)
    return train(model, cases, dtype, method, {**options, **extra})[0]


def alone(
    cases: tuple[Case, ...], dtype: torch.dtype, method: str, options: dict[str, Any]
) -> list[Tensor]:
    """The weights of one process; several tests compare with the same ones."""
    return _alone(cases, dtype, method, tuple(options.items()))


@functools.cache
def _alone(
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    method: str,
    options: tuple[tuple[str, Any], ...],
) -> list[Tensor]:
    return train(Parameters(cases, dtype), cases, dtype, method, dict(options))[0]
