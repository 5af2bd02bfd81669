"""Given the same gradients, every layout gives the weights of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import (
    HARD_CASES,
    Case,
    gradients,
    weights,
)
from sharded_adadiag.testing.ranks import run_threads

CLASSES = {"AdaDiag": AdaDiag, "AdafacDiag": AdafacDiag, "HfacDiag": HfacDiag}
STEPS, PERIOD = 30, 12  # refreshes at steps 1, 13 and 25


class Parameters(nn.Module):
    def __init__(self, cases: tuple[Case, ...], dtype: torch.dtype) -> None:
        super().__init__()
        for case, weight in zip(cases, weights(cases, dtype)):
            param = nn.Parameter(weight, requires_grad=not case.frozen)
            self.register_parameter(case.name, param)


def groups(model: nn.Module, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
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
    named = dict(model.named_parameters())
    for step in range(steps):
        for case, grad in zip(cases, gradients(cases, step, dtype)):
            param = named[case.name]
            if case.frozen or case.without_gradient:
                continue
            if isinstance(param, DTensor):
                grad = distribute_tensor(
                    grad, param.device_mesh, param.placements, src_data_rank=None
                )
            param.grad = grad
        opt.step()
    finals = []
    for case in cases:
        param = named[case.name].detach()
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        finals.append(whole.clone())
    return finals, opt


def sharded_model(
    layout: str, cases: tuple[Case, ...], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    model = Parameters(cases, dtype)
    if layout == "ddp":
        return model, {"process_group": dist.group.WORLD}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh), {}


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


LAYOUTS = [("fsdp2", n) for n in (1, 2, 3, 4, 8)] + [("ddp", 2), ("ddp", 4)]


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout,world_size", LAYOUTS)
def test_owner_distribution_gives_the_same_bits(layout, world_size, dtype, sides):
    options = {"sides": sides, "distribution": "owner"}
    want = alone(HARD_CASES, dtype, "AdaDiag", options)
    got = run_threads(world_size, body, layout, HARD_CASES, dtype, "AdaDiag", options)
    for rank in range(world_size):
        for case, a, b in zip(HARD_CASES, got[rank], want):
            assert_equal(a, b, case.name)


@pytest.mark.parametrize("basis", ["svd", "eigh"])
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("layout,world_size", LAYOUTS)
def test_broadcast_distribution_agrees_to_1e_6(layout, world_size, sides, basis):
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
