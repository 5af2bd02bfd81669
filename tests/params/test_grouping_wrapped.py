"""The same split on meta, compiled, wrapped and sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.families import (
    BlockMLP,
    ListMLP,
    ResNet,
    ViT,
    gpt2,
    hf_vit,
    llama,
    named,
    split,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from sharded_adadiag.params.grouping import param_groups

WORLD_SIZE = 4


@pytest.mark.parametrize("make", [llama, gpt2, hf_vit, ResNet, ViT, BlockMLP])
def test_the_same_split_on_the_meta_device(make: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = make()
    assert all(param.is_meta for param in model.parameters())
    assert split(model) == split(make())


def test_names_have_no_prefix_of_torch_compile_or_checkpointing() -> None:
    expected = split(BlockMLP())
    model = BlockMLP()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    model.out = torch.compile(model.out, backend="eager")
    assert named(model) != expected
    assert split(model) == expected
    assert split(torch.compile(model, backend="eager")) == expected
    wrapped = ListMLP()
    for i, layer in enumerate(wrapped.layers):
        wrapped.layers[i] = checkpoint_wrapper(layer)
    assert split(wrapped) == split(ListMLP())


def test_a_module_named_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(4, 8), "out": nn.Linear(8, 2)})
    assert split(model)[0] == ["module.weight"]


@pytest.fixture
def fake_ranks():
    """Several ranks in this process, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    yield init_device_mesh("cpu", (WORLD_SIZE,))
    dist.destroy_process_group()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model: nn.Module, mesh: object) -> nn.Module:
    """Shard the way examples do: every block but the last one, then the root."""
    blocks = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks.extend(list(module)[:-1])
    for block in reversed(blocks):  # inner ones first
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


FAMILIES = [llama, gpt2, hf_vit, ResNet, ViT, BlockMLP, ListMLP]


@pytest.mark.parametrize("make", FAMILIES)
def test_the_same_split_after_fully_shard(make: type[nn.Module], fake_ranks) -> None:
    model = shard(make(), fake_ranks)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert split(model) == split(make())


def test_the_same_split_after_fully_shard_on_meta(fake_ranks) -> None:
    with torch.device("meta"):
        model = llama(tied=True)
    assert split(shard(model, fake_ranks)) == split(llama(tied=True))


def test_a_headless_model_after_fully_shard_of_some_blocks(fake_ranks) -> None:
    model = shard(llama().model, fake_ranks)
    assert split(model) == split(llama().model)


def test_after_fully_shard_on_one_rank_the_optimizer_steps(one_rank) -> None:
    model = shard(ListMLP(), one_rank)
    optimizer = torch.optim.AdamW(param_groups(model))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert [group["rotate"] for group in optimizer.param_groups] == [True, False]


def test_the_same_split_inside_distributed_data_parallel(one_rank) -> None:
    model = DistributedDataParallel(llama())
    assert named(model)[0].startswith("module.")
    assert split(model) == split(llama())
