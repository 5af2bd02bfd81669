"""How a parameter is seen as matrices, and which ones param_groups sees so."""

import pytest
import torch
import torch.distributed as dist
from support.architectures import built
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sharded_adadiag import AdaDiag, AdafacDiag, param_groups
from sharded_adadiag.options import Options
from sharded_adadiag.params.holding import holding
from sharded_adadiag.plan.regions import Box
from sharded_adadiag.plan.view import MatrixView
from sharded_adadiag.testing.ranks import run_threads

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    ("shape", "batch_dims", "split_rows", "heights", "cols", "batch"),
    [
        ((), 0, None, (1,), 1, ()),
        ((7,), 1, None, (1,), 7, ()),
        ((6, 5), 0, None, (6,), 5, ()),
        ((6, 5), 1, None, (6,), 5, ()),
        ((8, 3, 2, 2), 0, None, (8,), 12, ()),
        ((4, 6, 5), 1, None, (6, 6, 6, 6), 5, (4,)),
        ((2, 3, 6, 5), 2, None, (6,) * 6, 5, (2, 3)),
        ((3, 8, 2, 2), 1, None, (8, 8, 8), 4, (3,)),
        ((6, 5), 0, [3, 2, 1], (3, 2, 1), 5, ()),
        ((9,), 0, [3, 2, 1], (1,), 9, ()),
    ],
)
def test_a_view_says_heights_and_columns(
    shape, batch_dims, split_rows, heights, cols, batch
):
    view = MatrixView.of(shape, batch_dims, split_rows)
    assert (view.heights, view.cols, view.batch) == (heights, cols, batch)
    rows, columns = view.stored
    assert rows * columns == view.rows * view.cols == torch.empty(shape).numel()


@pytest.mark.parametrize(
    ("shape", "options", "told"),
    [
        ((4, 6, 5), {"batch_dims": 2}, "batch_dims: got 2 .* two dimensions"),
        ((7, 5), {"split_rows": [3, 2, 1]}, r"split_rows: got \[3, 2, 1\] .* rows, 7"),
        ((6, 5, 4), {"split_rows": [3, 3], "batch_dims": 1}, "one of them"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shape_that_does_not_suit_is_refused_on_every_rank(
    shape, options, told, ranks
):
    def body(rank):
        params = [("odd", nn.Parameter(torch.ones(shape)))]
        group = {"params": params, "rotate": True, **options}
        world = dist.group.WORLD if ranks > 1 else None
        opt = AdaDiag([group], process_group=world)
        params[0][1].grad = torch.ones(shape)
        with pytest.raises(ValueError, match=f"odd: .*{told}"):
            opt.step()
        return True

    assert all([body(0)] if ranks == 1 else run_threads(ranks, body))


@pytest.mark.parametrize(
    "options",
    [{"batch_dims": -1}, {"batch_dims": 1.5}, {"split_rows": []}, {"split_rows": [0]}],
)
def test_an_option_that_no_parameter_suits_is_refused(options):
    with pytest.raises(ValueError, match=f"invalid {next(iter(options))}"):
        AdaDiag([{"params": [nn.Parameter(torch.ones(6, 5))], **options}])
    assert Options(split_rows=[3, 3]) == Options(split_rows=(3, 3))


def test_vectors_and_matrices_of_a_group_of_stacks_are_as_ever():
    def run(**options):
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 5), (7,)]
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        opt = AdaDiag([{"params": params, "rotate": True, **options}], lr=1e-2)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            opt.step()
        return [param.detach() for param in params]

    for one, other in zip(run(), run(batch_dims=1)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("places", "cols", "box"),
    [
        ((Replicate(), Shard(0)), 30, Box(2, 4, 0, 30)),
        ((Replicate(), Shard(1)), 30, Box(0, 4, 15, 30)),
        ((Replicate(), Shard(2)), 5, Box(0, 24, 3, 5)),
        ((Shard(0), Shard(1)), 30, Box(2, 4, 15, 30)),
        ((Shard(0), Shard(2)), 5, Box(12, 24, 3, 5)),
    ],
)
def test_a_shard_of_a_stack_is_a_box_of_one_of_two_views(places, cols, box):
    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        tensor = distribute_tensor(
            torch.ones(4, 6, 5), mesh, places, src_data_rank=None
        )
        held = holding(tensor, "stack", {"batch_dims": 1})
        return held.cols, held.region

    assert run_threads(4, body)[3] == (cols, box)


def test_a_stack_cut_along_both_sides_of_its_matrices_is_refused():
    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        places = (Shard(1), Shard(2))
        tensor = distribute_tensor(
            torch.ones(4, 6, 5), mesh, places, src_data_rank=None
        )
        with pytest.raises(NotImplementedError, match="stack: .* dimension 1"):
            holding(tensor, "stack", {"batch_dims": 1})
        return True

    assert all(run_threads(4, body))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_family_have_bases_of_their_own(family):
    model = built(family).to_empty(device="cpu")
    groups = param_groups(model)
    assert [g.get("batch_dims", 0) for g in groups] == [0, 1, 0]
    assert [g["rotate"] for g in groups] == [True, True, False]
    names = {name.rpartition(".")[2] for name, _ in groups[1]["params"]}
    assert names == {"gate_up_proj", "down_proj"}
    opt = AdafacDiag(groups, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        nn.init.zeros_(param)
        param.grad = torch.randn(param.shape, generator=generator)
    opt.step()
    for param in opt.param_groups[1]["params"]:
        count, rows, cols = param.shape
        short, side = min((rows, "left"), (cols, "right"), key=lambda pair: pair[0])
        rotation = opt.state[param][f"rotation_{side}"]
        assert rotation.shape == (count, short, short)
        product = rotation @ rotation.mT
        torch.testing.assert_close(product, torch.eye(short).expand_as(product))
        assert not torch.equal(rotation[0], rotation[1])


def test_without_stacked_experts_there_are_two_groups():
    assert [g.get("batch_dims") for g in param_groups(built("llama"))] == [None, None]
