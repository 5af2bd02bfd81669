"""A small model of blocks, and the plain optimizer that follows a run on ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.params.fsdp1 import remembered
from sharded_adadiag.testing.assertions import assert_equal
from support.training import join, whole

STEPS, PERIOD, VOCAB, WIDTH = 7, 3, 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, blocks (one of them used twice), head; the head may be tied."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.shared_expert = Block()
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.unused = nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.shared_expert(block(x)) + self.frozen(x)
        return self.head(x)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """The same weights on every rank; threads share the global random state."""
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(i)
        flat = remembered(param, "")
        size = tuple(param.shape) if flat is None else flat[0]
        value = torch.empty(size).uniform_(-0.3, 0.3, generator=generator)
        if flat is not None:
            value = value.reshape(-1)[flat[1].start : flat[1].stop]
        elif isinstance(param, DTensor):
            value = torch.distributed.tensor.distribute_tensor(
                value, param.device_mesh, param.placements, src_data_rank=None
            ).to(param.dtype)
        param.copy_(value)


def build(**options: Any) -> Model:
    model = Model(**options)
    fill(model)
    return model


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, VOCAB, (4, 9), generator=generator)
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make(model: nn.Module, **options: Any) -> AdaDiag:
    groups = param_groups(model)
    return AdaDiag(
        groups,
        lr=1e-2,
        weight_decay=0.1,
        refresh_every=PERIOD,
        **{"distribution": "owner", **options},
    )


def full_gradient(param: Tensor) -> Tensor | None:
    """The whole gradient that the ranks hold between them."""
    if remembered(param, "") is None:
        return None if param.grad is None else whole(param.grad).clone()
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, param.grad)
    there = [piece for piece in pieces if piece is not None]
    # FSDP1 gives an empty piece no gradient.
    return join(there, remembered(param, "")[0]) if there else None


class Follower:
    """The plain optimizer; without an owner of its own it is one process."""

    def __init__(self, opt: torch.optim.Optimizer, dtype: torch.dtype | None) -> None:
        self.params: dict[Tensor, nn.Parameter] = {}
        groups = []
        for group in opt.param_groups:
            for p in group["params"]:
                copy = whole(p).detach().clone()
                self.params[p] = nn.Parameter(copy, requires_grad=p.requires_grad)
            kept = {k: v for k, v in group.items() if k != "params"}
            groups.append({**kept, "params": [self.params[p] for p in group["params"]]})
            names = kept.get("param_names")
            if names:
                groups[-1]["params"] = list(zip(names, groups[-1]["params"]))
                del groups[-1]["param_names"]
        self.opt = AdaDiag(groups)

    def step(self) -> None:
        for param, copy in self.params.items():
            copy.grad = full_gradient(param)
        self.opt.step()

    def compare(self) -> None:
        for i, (param, copy) in enumerate(self.params.items()):
            assert_equal(whole(param).detach(), copy.detach(), f"parameter {i}")


def train(
    rank: int,
    model: nn.Module,
    opt: Any,
    *,
    backward: Callable[[nn.Module, int, int], None] | None = None,
) -> None:
    """Steps with a follower beside it; every rank compares."""
    follower = Follower(opt, None)
    before = [whole(p).detach().clone() for p in follower.params]
    for step in range(STEPS):
        opt.zero_grad()
        if backward is None:
            loss_of(model, rank, step).backward()
        else:
            backward(model, rank, step)
        follower.step()
        opt.step()
        follower.compare()
    moved = [
        not torch.equal(a, whole(p))
        for a, p in zip(before, follower.params, strict=True)
    ]
    assert sum(moved) >= len(moved) - 3  # all but the frozen and the unused ones


def mesh_of(*shape: int) -> DeviceMesh:
    names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def wrapped(model: Model, **options: Any) -> Model:
    """``fully_shard`` as users write it: blocks, then the root."""
    options.setdefault("mesh", mesh_of(dist.get_world_size()))
    for block in [*model.blocks, model.shared_expert]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp1(strategy: str = "FULL_SHARD", mesh: DeviceMesh | None = None) -> nn.Module:
    return FullyShardedDataParallel(
        build(),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        sharding_strategy=ShardingStrategy[strategy],
        device_mesh=mesh,
    )
