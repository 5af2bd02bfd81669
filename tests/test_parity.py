"""Given the same gradients, every layout gives the weights of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pairs import parametrize_pairs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, param_groups
from sharded_adadiag.params.fsdp1 import remembered
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import (
    HARD_CASES,
    Case,
    gradients,
    weights,
)
from sharded_adadiag.testing.ranks import run_processes, run_threads

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


def body(
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
    return train(Parameters(cases, dtype), cases, dtype, method, options)[0]


LAYOUTS = (
    [("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)]
    + [("fsdp2", n) for n in (1, 2, 3, 4, 8)]
    + [("ddp", 2), ("ddp", 4)]
)


@parametrize_pairs(
    place=LAYOUTS, dtype=(torch.float32, torch.float64), sides=("one", "two")
)
def test_owner_distribution_gives_the_same_bits(place, dtype, sides):
    layout, world_size = place
    options = {"sides": sides, "distribution": "owner"}
    want = alone(HARD_CASES, dtype, "AdaDiag", options)
    got = run_threads(world_size, body, layout, HARD_CASES, dtype, "AdaDiag", options)
    for rank in range(world_size):
        for case, a, b in zip(HARD_CASES, got[rank], want):
            assert_equal(a, b, case.name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_flat_pieces_of_fsdp1_give_the_same_bits(world_size, sides):
    options = {"sides": sides}
    cases = tuple(c for c in HARD_CASES if not c.frozen)
    want = alone(cases, torch.float32, "AdaDiag", options)
    got = run_processes(
        world_size, body, "fsdp1", cases, torch.float32, "AdaDiag", options
    )
    for rank in range(world_size):
        for case, a, b in zip(cases, got[rank], want):
            assert_equal(a, b, case.name)


@parametrize_pairs(place=LAYOUTS, sides=("one", "two"), basis=("svd", "eigh"))
def test_broadcast_distribution_agrees_to_1e_6(place, sides, basis):
    layout, world_size = place
    options = {"sides": sides, "basis": basis, "distribution": "broadcast"}
    want = alone(HARD_CASES, torch.float64, "AdaDiag", options)
    got = run_threads(
        world_size, body, layout, HARD_CASES, torch.float64, "AdaDiag", options
    )
    for rank in range(world_size):
        for case, a, b in zip(HARD_CASES, got[rank], want):
            torch.testing.assert_close(
                a, b, atol=1e-6, rtol=1e-6, msg=lambda m, c=case: f"{c.name}: {m}"
            )


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_bfloat16_parameters_get_the_same_bits(state_dtype):
    options = {"distribution": "owner", "state_dtype": state_dtype}
    want = alone(HARD_CASES, torch.bfloat16, "AdaDiag", options)
    got = run_threads(3, body, "fsdp2", HARD_CASES, torch.bfloat16, "AdaDiag", options)
    for case, a, b in zip(HARD_CASES, got[2], want):
        assert_equal(a, b, case.name)


def few_steps(rank: int, layout: str, cases: tuple[Case, ...]) -> list[Tensor]:
    model, extra = sharded_model(layout, cases, torch.float32)
    options = {"distribution": "owner", **extra}
    return train(model, cases, torch.float32, "AdaDiag", options, steps=3)[0]


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_64_ranks_give_the_same_bits(layout):
    """Far more ranks than matrices, and most shards empty."""
    cases = tuple(c for c in HARD_CASES if not c.frozen)
    model = Parameters(cases, torch.float32)
    options = {"distribution": "owner"}
    want, _ = train(model, cases, torch.float32, "AdaDiag", options, steps=3)
    got = run_threads(64, few_steps, layout, cases)
    for rank in (0, 31, 63):
        for case, a, b in zip(cases, got[rank], want):
            assert_equal(a, b, case.name)
