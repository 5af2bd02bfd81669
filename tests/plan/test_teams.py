"""Who works on what: integers only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.plans import (
    flat_shards,
    hidden_shapes,
    max_over_mean,
    planned,
    rank_loads,
    row_shards,
)

from sharded_adadiag.algorithm.state import ADAFACDIAG
from sharded_adadiag.plan import teams
from sharded_adadiag.plan.cost import MatrixCost
from sharded_adadiag.plan.regions import Box
from sharded_adadiag.plan.teams import Demand, choose_teams


def demand(step, lines, refresh=7, state=1000, rotation=100):
    return Demand(MatrixCost(step, refresh, 200, state), lines, rotation)


@pytest.mark.parametrize("world_size", range(2, 9))
@pytest.mark.parametrize("model", ["GPT", "60M"])
@pytest.mark.parametrize("distribution", ["auto", "owner"])
def test_few_ranks_work_and_keep_alike_whatever_is_broadcast(
    distribution, model, world_size
):
    shapes = hidden_shapes(model)
    layouts = row_shards(shapes, world_size)
    matrices = planned(shapes, layouts, distribution=distribution)
    for loads in rank_loads(matrices, world_size):
        assert max_over_mean(loads) <= 1.10


@pytest.mark.parametrize("shards", [row_shards, flat_shards])
@pytest.mark.parametrize("world_size", [8, 64, 512, 4096])
@pytest.mark.parametrize("model", ["7B", "70B"])
def test_thousands_of_ranks_work_alike(model, world_size, shards):
    shapes = hidden_shapes(model)
    matrices = planned(shapes, shards(shapes, world_size))
    work, state = rank_loads(matrices, world_size)
    assert max_over_mean(work) <= (1.10 if world_size < 4096 else 1.15)
    assert max_over_mean(state) <= 1.15
    sizes = {len(m.route.team) for m in matrices}
    if world_size == 8:
        assert sizes == {1}
    if world_size == 4096:
        # Blocks of one shape are even: none is worked on by more ranks than needed.
        mean = sum(work) / world_size
        for m in matrices:
            fewer = len(m.route.team) - 1
            assert not fewer or m.cost.step / fewer > 0.9 * mean


def test_teams_of_one_are_kept_where_they_are_balanced():
    even = [demand(100, 6400)] * 8
    assert [len(t.ranks) for t in choose_teams(even, 4)] == [1] * 8
    nine = choose_teams([demand(100, 6400)] * 9, 4)
    assert max(len(t.ranks) for t in nine) > 1


def test_a_matrix_of_few_lines_is_not_divided():
    narrow = choose_teams([demand(100, 2 * teams.MIN_LINES - 1)] * 3, 2)
    assert [len(t.ranks) for t in narrow] == [1, 1, 1]
    wide = choose_teams([demand(100, 2 * teams.MIN_LINES)] * 3, 2)
    assert sorted(len(t.ranks) for t in wide) == [1, 1, 2]


def test_what_ranks_bear_already_counts():
    (team,) = choose_teams([demand(50, 1)], 3, [(0, demand(100, 1).cost)] * 2)
    assert team.head != 0
    shapes = hidden_shapes("60M")[:7]
    first = planned(shapes[:1], row_shards(shapes[:1], 2), distribution="owner")
    later = planned(
        shapes[:1], row_shards(shapes[:1], 2), distribution="auto", earlier=first
    )
    assert later[0].route.owner != first[0].route.owner


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 2000)), max_size=12),
    st.integers(1, 9),
    st.sampled_from([None, 2, 4]),
)
def test_every_matrix_has_a_team_of_ranks_with_a_head_among_them(
    matrices, world_size, ranks_per_node
):
    given_ = [demand(step, lines) for step, lines in matrices]
    chosen = choose_teams(given_, world_size, ranks_per_node=ranks_per_node)
    again = choose_teams(list(given_), world_size, ranks_per_node=ranks_per_node)
    assert chosen == again and len(chosen) == len(matrices)
    for matrix, team in zip(given_, chosen):
        assert list(team.ranks) == sorted(set(team.ranks))
        assert 0 <= team.ranks[0] and team.ranks[-1] < world_size
        assert team.head in team.ranks and len(team.ranks) <= matrix.max_ranks


def test_a_team_stays_on_one_node_that_has_room():
    heavy = [demand(1000, 6400)] * 3 + [demand(500, 6400)] * 2
    for team in choose_teams(heavy, 16, ranks_per_node=8):
        assert len({rank // 8 for rank in team.ranks}) == 1


@pytest.mark.parametrize(
    "model,world_size,node",
    [("130M", 128, 4), ("130M", 128, 8), ("60M", 64, 4), ("60M", 64, 8)],
)
def test_who_knows_of_nodes_is_on_no_more_of_them(model, world_size, node):
    shapes = hidden_shapes(model)
    layouts = row_shards(shapes, world_size)
    crossed = [
        sum(len({rank // node for rank in m.route.team}) for m in matrices)
        for matrices in (
            planned(shapes, layouts),
            planned(shapes, layouts, ranks_per_node=node),
        )
    ]
    assert crossed[1] <= crossed[0]


def test_heads_share_the_refreshes():
    chosen = choose_teams([demand(100, 6400)] * 3, 12)
    assert len({team.head for team in chosen}) == 3


def test_members_keep_a_block_of_the_moments_and_a_rotation_and_others_nothing():
    shape = (256, 192)
    (matrix,) = planned([shape], row_shards([shape], 4))
    assert matrix.route.kind == "team" and list(matrix.route.team) == [0, 1, 2, 3]
    assert not matrix.left and matrix.right  # rows are divided
    for rank, region in enumerate(matrix.route.moments.layout):
        assert region == Box(64 * rank, 64 * rank + 64, 0, 192)
        assert matrix.state_shapes(rank) == {
            "exp_avg": ((64, 192), torch.float32),
            "exp_avg_sq": ((64, 192), torch.float32),
            "rotation_right": ((192, 192), torch.float32),
        }
    (matrix,) = planned([shape], row_shards([shape], 6), rule=ADAFACDIAG)
    members = list(matrix.route.team)
    (outsider, *_) = set(range(6)) - set(members)
    assert {s for s, _ in matrix.state_shapes(outsider).values()} == {(0, 0), (0,)}
    for rank in members:
        shapes = {key: s for key, (s, _) in matrix.state_shapes(rank).items()}
        assert shapes["exp_avg_sq_row"] == (64,) and shapes["exp_avg_sq_col"] == (192,)
    assert matrix.state_bytes(outsider) == 0


def test_two_sides_take_two_stages_within_the_team():
    shape = (256, 192)
    (matrix,) = planned([shape], row_shards([shape], 3), sides="two")
    assert matrix.route.kind == "team" and not matrix.divisible
    _, rows, cols = matrix.route.stages
    assert (rows.split, rows.right, rows.left) == ("rows", True, False)
    assert (cols.split, cols.right, cols.left) == ("cols", False, True)
    assert [r.shape for r in rows.layout] == [(85, 192), (85, 192), (86, 192)]
    assert [r.shape for r in cols.layout] == [(256, 64)] * 3
    whole = planned(
        [shape], row_shards([shape], 3), sides="two", on_refresh="reproject"
    )
    assert whole[0].route.kind == "owner"


def test_only_lines_that_wait_for_no_sum_may_be_cut_over_rounds():
    shape = (256, 192)
    layouts = row_shards([shape], 2)
    assert planned([shape], layouts)[0].divisible
    assert not planned([shape], layouts, noise_floor=0.1)[0].divisible
    assert not planned([shape], layouts, sides="two")[0].divisible
    assert not planned([shape], layouts, rule=ADAFACDIAG)[0].divisible
