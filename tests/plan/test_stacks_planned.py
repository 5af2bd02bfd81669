"""Who owns the matrices of a stack, and what of it is moved."""

import pytest
import torch
from support.plans import max_over_mean, rank_loads
from support.specs import spec

from sharded_adadiag.algorithm.state import ADADIAG
from sharded_adadiag.plan.geometry import Layout, cut_rows
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.regions import Box, FlatRange, entries_above
from sharded_adadiag.plan.report import report_of

HEIGHT, WIDTH = 24, 16


def by_expert(count, ranks, replicas=1):
    """Shard(0) over the experts, and copies of that."""
    size = -(-count // ranks)
    edges = [min(size * i, count) for i in range(ranks + 1)]
    boxes = [Box(a, b, 0, HEIGHT * WIDTH) for a, b in zip(edges, edges[1:])]
    return Layout.of(boxes * replicas)


def planned(layout, *counts, **options):
    specs = [
        spec(f"stack{i}", n, HEIGHT, WIDTH, **options) for i, n in enumerate(counts)
    ]
    layouts = [layout] * len(counts)
    return Plan.of(specs, layouts, rule=ADADIAG, world_size=len(layout))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_what_lies_whole_on_a_rank_is_owned_there_and_not_moved(ranks):
    layout = by_expert(8, ranks)
    plan = planned(layout, 8, batch_dims=1)
    for m in plan.matrices:
        whose = layout[m.route.owner]
        assert whose.row_start <= m.share.first
        assert m.share.first + m.share.count <= whose.row_stop
    assert sum(m.share.count for m in plan.matrices) == 8
    assert all(m.held for m in plan.matrices)
    assert not any(round_.moves for round_ in plan.rounds)


def test_replicas_divide_what_they_hold():
    plan = planned(by_expert(8, 2, replicas=4), 8, batch_dims=1)
    owners = {
        m.route.owner: range(m.share.first, m.share.first + 1) for m in plan.matrices
    }
    assert sorted(owners) == list(range(8))
    for owner, experts in owners.items():
        assert all(expert // 4 == owner % 2 for expert in experts)


def test_few_experts_on_many_ranks_are_spread_over_layers():
    plan = planned(by_expert(4, 32), *[4] * 16, batch_dims=1)
    work, state = rank_loads(plan.matrices, 32)
    assert max_over_mean(work) == max_over_mean(state) == 1.0
    assert not all(m.held for m in plan.matrices)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_pieces_of_every_matrix_are_divided_evenly(batch_dims):
    numel = 8 * HEIGHT * WIDTH
    flat = Layout.of(FlatRange(numel * r // 3, numel * (r + 1) // 3) for r in range(3))
    plan = planned(flat, *[8] * 3, batch_dims=batch_dims)
    counts = [0, 0, 0]
    for m in plan.matrices:
        counts[m.route.owner] += m.share.count
    assert counts == ([8, 8, 8] if batch_dims else [1, 1, 1])


def test_a_rank_works_on_its_own_runs_of_a_stack_only():
    plan = planned(by_expert(8, 4), 8, 8, batch_dims=1)
    (local,) = plan.rounds
    for rank in range(4):
        own = local.on(rank).parts
        assert [p.matrix.route.owner for p in own] == [rank, rank]


def test_matrices_too_large_for_one_run_are_in_one_row_of_the_report():
    large = Layout.of([Box(0, 6, 0, 1024 * 512)] * 2)
    wide = spec("experts", 6, 1024, 512, batch_dims=1)
    plan = Plan.of([wide], [large], rule=ADADIAG, world_size=2)
    assert [m.share.count for m in plan.matrices] == [1, 2, 1, 2]
    rows = report_of(plan).matrices
    assert [(row.name, row.count) for row in rows] == [
        ("experts[0..2]", 3),
        ("experts[3..5]", 3),
    ]
    assert {row.state_bytes for row in rows} == {3 * 4 * (2 * 1024 * 512 + 512**2)}


def test_blocks_of_rows_are_matrices_by_themselves():
    rows = Layout.of(Box(a, a + 8, 0, 5) for a in (0, 8, 16))
    fused = spec("qkv", 24, 5, split_rows=[12, 6, 6])
    plan = Plan.of([fused], [rows], rule=ADADIAG, world_size=3, distribution="owner")
    assert [m.shape for m in plan.matrices] == [(12, 5), (6, 5), (6, 5)]
    assert [m.view.name for m in plan.matrices] == ["qkv[0]", "qkv[1]", "qkv[2]"]
    first, second, third = (m.view.layout for m in plan.matrices)
    assert list(first)[:2] == [Box(0, 8, 0, 5), Box(8, 12, 0, 5)]
    assert list(second)[1:] == [Box(0, 4, 0, 5), Box(4, 6, 0, 5)]
    assert third[2] == Box(0, 6, 0, 5)
    assert not first[2].numel and not third[0].numel


def test_the_part_of_a_piece_that_is_a_row_block_is_one_stretch_of_it():
    matrix = torch.arange(60).view(12, 5)
    for region in (Box(2, 9, 1, 4), FlatRange(13, 41)):
        layout = Layout.of([region])
        piece = entries(matrix, region)
        for top, bottom in ((0, 3), (1, 5), (4, 12), (0, 12)):
            inside = cut_rows(layout, top, bottom, 5)[0]
            start = entries_above(region, top, 5)
            wanted = entries(matrix[top:bottom], inside)
            assert torch.equal(piece[start : start + inside.numel], wanted)


def entries(matrix, region):
    if isinstance(region, FlatRange):
        return matrix.reshape(-1)[region.start : region.stop]
    rows = slice(region.row_start, region.row_stop)
    return matrix[rows, region.col_start : region.col_stop].reshape(-1)
