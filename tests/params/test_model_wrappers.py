"""Compiled and checkpointed models train as plain ones do, under the same names."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sharded_adadiag import AdaDiag, param_groups
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes

WIDTH, VOCABULARY, BATCH, STEPS = 8, 12, 96, 5
EXCLUDE = ["blocks.*.gate.*"]
ROTATED = [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")]
# Traces and differentiates as inductor does, but needs no C++ compiler.
BACKEND = "aot_eager"
# Dynamo looks at .grad of the tensors between blocks, which torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 12, bias=False)
        self.up = nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.tanh(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in self.parameters():
                param.normal_(0.0, 0.5, generator=generator)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpointed:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


def compiled(module):
    return torch.compile(module, backend=BACKEND)


def shard(model):
    """FSDP2 block by block, where there is more than one rank."""
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def wrap_blocks(model, *wrappers):
    for i in range(len(model.blocks)):
        for wrapper in wrappers:
            model.blocks[i] = wrapper(model.blocks[i])
    return model


def compiled_in_place(model):
    model.compile(backend=BACKEND)
    return model


VARIANTS = {
    "plain": lambda: shard(Model()),
    "compiled": lambda: compiled(shard(Model())),
    "compiled in place": lambda: compiled_in_place(shard(Model())),
    "blocks compiled, then sharded": lambda: shard(wrap_blocks(Model(), compiled)),
    "sharded, then blocks compiled": lambda: wrap_blocks(shard(Model()), compiled),
    "checkpointed in the forward": lambda: shard(Model(checkpointed=True)),
    "checkpointed": lambda: shard(wrap_blocks(Model(), checkpoint_wrapper)),
    "checkpointed, compiled": lambda: compiled(
        shard(wrap_blocks(Model(), checkpoint_wrapper, compiled))
    ),
}
REPLICAS = {
    "ddp": lambda: DistributedDataParallel(Model()),
    "ddp of compiled": lambda: DistributedDataParallel(compiled(Model())),
    "compiled ddp": lambda: compiled(DistributedDataParallel(Model())),
}


def trained(make):
    """The weights by name after some steps, and the names that were rotated."""
    torch.compiler.reset()
    model = make()
    groups = param_groups(model, exclude=EXCLUDE)
    named = {name: param for group in groups for name, param in group["params"]}
    rotated = [name for name, _ in groups[0]["params"]]
    opt = AdaDiag(groups, lr=1e-2, refresh_every=3)
    share = slice(None)
    if dist.is_initialized():
        size = BATCH // dist.get_world_size()
        share = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    generator = torch.Generator().manual_seed(6)
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH,), generator=generator)
        wanted = torch.randint(VOCABULARY, (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens[share]), wanted[share])
        loss.backward()
        opt.step()
        opt.zero_grad()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in named.items()
    }
    return weights, rotated


def check(result, want):
    weights, rotated = result
    assert rotated == ROTATED
    assert list(weights) == list(want)
    for name, weight in weights.items():
        # Compilers and ranks add up in another order; gradients have full rank.
        torch.testing.assert_close(weight, want[name], atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_one_process_wrappers_change_neither_names_nor_steps(variant):
    plain, _ = trained(VARIANTS["plain"])
    result = trained(VARIANTS[variant])
    check(result, plain)
    if "compiled" not in variant:
        for name, weight in result[0].items():
            assert_equal(weight, plain[name], name)


ON_RANKS = REPLICAS | {
    name: VARIANTS[name]
    for name in (
        "compiled",
        "blocks compiled, then sharded",
        "checkpointed",
        "checkpointed, compiled",
    )
}


def every_variant(rank):
    return [trained(make) for make in ON_RANKS.values()]


@pytest.mark.multiprocess
def test_on_two_ranks_wrappers_change_neither_names_nor_steps():
    plain, _ = trained(VARIANTS["plain"])
    for results in run_processes(2, every_variant):
        assert len(results) == len(ON_RANKS)
        for result in results:
            check(result, plain)


def test_patterns_are_for_the_names_without_prefixes():
    model = compiled(wrap_blocks(Model(), checkpoint_wrapper, compiled))
    raw = [name for name, _ in model.named_parameters()]
    assert "_orig_mod.blocks.0._orig_mod._checkpoint_wrapped_module.up.weight" in raw
    groups = param_groups(model, exclude="blocks.0.*")
    assert [name for name, _ in groups[0]["params"]] == [
        f"blocks.1.{name}.weight" for name in ("gate", "up", "down")
    ]
    with pytest.raises(ValueError, match="'_orig_mod.*' matches none"):
        param_groups(model, exclude="_orig_mod.*")
