"""Layouts made from a description are those that the frameworks make."""

import os

import pytest
import torch
from support.decoders import EVEN_MODEL, TINY_MODEL, groups, shared
from torch import nn

from sharded_adadiag import AdaDiag
from sharded_adadiag.plan.geometry import tiling_error
from sharded_adadiag.plan.regions import Box, FlatRange
from sharded_adadiag.planner.mesh import Mesh, layouts_of
from sharded_adadiag.planner.models import DECODERS, Weight, named_model
from sharded_adadiag.testing.ranks import run_processes, run_threads

MESHES = [
    Mesh(1),
    Mesh(2),
    Mesh(4),
    Mesh(7),
    Mesh(4, "fsdp2", replicas=2),
    Mesh(8, "fsdp2", replicas=4),
    Mesh(4, "fsdp2", tensor_parallel=2),
    Mesh(8, "fsdp2", replicas=2, tensor_parallel=2),
    Mesh(3, "ddp"),
]


def found(rank, model, mesh):
    """The layouts that an optimizer finds, by name of the parameter."""
    module, extra = shared(model, mesh)
    optimizer = AdaDiag(groups(module, model), **extra)
    engine = optimizer._binding.prepared()
    return {entry.spec.name: entry.layout for entry in engine.entries}


def described(model, mesh):
    names = [weight.name for weight in model.weights]
    return dict(zip(names, layouts_of(model.weights, mesh)))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_layouts_are_those_of_the_framework(mesh):
    model = EVEN_MODEL if mesh.tensor_parallel > 1 else TINY_MODEL
    assert run_threads(mesh.ranks, found, model, mesh)[0] == described(model, mesh)


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_layouts_are_those_of_fsdp1(ranks):
    mesh = Mesh(ranks, "fsdp1")
    assert run_processes(ranks, found, TINY_MODEL, mesh)[0] == described(
        TINY_MODEL, mesh
    )


def under_deepspeed(rank):
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import deepspeed.ops

    # Built just in time, and not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    class Chain(nn.Module):
        """One matrix after another, and a norm."""

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(7, 9)
            self.second = nn.Linear(9, 5, bias=False)

        def forward(self, x):
            return self.second(self.first(x)).square().mean()

    model = Chain()
    named = list(model.named_parameters())
    parts = [
        {"params": [(n, p) for n, p in named if (p.dim() > 1) is on], "rotate": on}
        for on in (True, False)
    ]
    optimizer = AdaDiag(parts)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    engine.backward(engine(torch.ones(2, 7) * (rank + 1)))
    engine.step()
    entries = optimizer._binding.prepared().entries
    return {entry.spec.name: entry.layout for entry in entries}


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_layouts_are_those_of_deepspeed(ranks):
    pytest.importorskip("deepspeed")
    shapes = {"first.weight": (9, 7), "first.bias": (9,), "second.weight": (5, 9)}
    weights = [Weight(name, shape, len(shape) > 1) for name, shape in shapes.items()]
    want = dict(zip(shapes, layouts_of(weights, Mesh(ranks, "zero"))))
    assert run_processes(ranks, under_deepspeed)[0] == want


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1", "ddp", "zero"])
@pytest.mark.parametrize("ranks", [1, 3, 8, 100])
def test_every_entry_of_every_model_is_somewhere_once(layout, ranks):
    for name in ("llama-60m", "mixtral-8x7b"):
        weights = named_model(name).weights[:40]
        for weight, found in zip(weights, layouts_of(weights, Mesh(ranks, layout))):
            rows = weight.shape[0] if len(weight.shape) > 1 else 1
            assert tiling_error(found, rows, weight.numel // rows) is None
            assert len(found) == ranks


def test_row_shards_of_a_matrix_are_chunks_of_torch():
    weight = Weight("w", (10, 3), True)
    (layout,) = layouts_of([weight], Mesh(4))
    sizes = [len(chunk) for chunk in torch.arange(10).chunk(4)]
    assert [region.shape[0] for region in layout] == sizes


def test_zero_lays_groups_end_to_end_and_rounds_up_to_two_entries_a_rank():
    weights = [
        Weight("a", (3, 3), True),
        Weight("v", (5,), False),
        Weight("b", (2, 4), True),
    ]
    a, v, b = layouts_of(weights, Mesh(2, "zero"))
    # 17 entries round up to 20, ten of them on each rank.
    assert list(a) == [FlatRange(0, 9), FlatRange(0, 0)]
    assert list(b) == [FlatRange(0, 1), FlatRange(1, 8)]
    assert list(v) == [FlatRange(0, 4), FlatRange(4, 5)]


def test_replicas_of_tensor_parallel_parts_hold_the_same_box():
    weights = [Weight("o_proj.weight", (8, 6), True), Weight("norm", (8,), False)]
    box, norm = layouts_of(weights, Mesh(8, replicas=2, tensor_parallel=2))
    assert list(box.holders(1)) == [1, 5] and box[1] == Box(0, 4, 3, 6)
    assert list(norm.holders(0)) == [0, 1, 4, 5]


@pytest.mark.parametrize(
    "mesh,word",
    [
        ({"ranks": 0}, "--ranks"),
        ({"ranks": 4, "replicas": 3}, "--replicas 3"),
        ({"ranks": 4, "tensor_parallel": 8}, "--tensor-parallel 8"),
        ({"ranks": 4, "replicas": -1}, "--replicas"),
        ({"ranks": 4, "layout": "zero", "replicas": 2}, "--replicas"),
        ({"ranks": 4, "layout": "ddp", "tensor_parallel": 2}, "--tensor-parallel"),
        ({"ranks": 4, "layout": "fsdp3"}, "fsdp3"),
    ],
)
def test_ranks_that_do_not_divide_are_refused(mesh, word):
    with pytest.raises(ValueError, match=word):
        Mesh(**mesh)


def test_tensor_parallelism_is_refused_where_it_is_not_known_how():
    with pytest.raises(ValueError, match="odd.weight"):
        layouts_of([Weight("odd.weight", (4, 4), True)], Mesh(2, tensor_parallel=2))


def test_all_models_can_be_tensor_parallel():
    for name in DECODERS:
        weights = named_model(name).weights[:12]
        assert layouts_of(weights, Mesh(8, tensor_parallel=4))
