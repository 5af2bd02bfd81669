"""What regions share, against sets of entries."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_adadiag.plan.blocks import team_blocks
from sharded_adadiag.plan.geometry import EMPTY, Layout, on_team
from sharded_adadiag.plan.regions import Box, FlatRange, shared_regions


def entries(region, cols):
    if isinstance(region, FlatRange):
        return list(range(region.start, region.stop))
    return [
        r * cols + c
        for r in range(region.row_start, region.row_stop)
        for c in range(region.col_start, region.col_stop)
    ]


@st.composite
def regions(draw, rows, cols):
    if draw(st.booleans()):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, rows * cols)] * 2)))
        return FlatRange(start, stop)
    top, bottom = sorted(draw(st.tuples(*[st.integers(0, rows)] * 2)))
    left, right = sorted(draw(st.tuples(*[st.integers(0, cols)] * 2)))
    return Box(top, bottom, left, right)


@st.composite
def pairs(draw):
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return draw(regions(rows, cols)), draw(regions(rows, cols)), cols


@settings(max_examples=1000)
@given(pairs())
def test_shared_regions_are_the_common_entries_each_once_and_in_order(case):
    a, b, cols = case
    shared = shared_regions(a, b, cols)
    got = [entry for region in shared for entry in entries(region, cols)]
    assert got == sorted(set(entries(a, cols)) & set(entries(b, cols)))
    assert all(region.numel > 0 for region in shared) and len(shared) <= 3
    assert shared == shared_regions(b, a, cols)


def test_a_flat_range_shares_with_narrow_columns_a_row_end_rows_and_a_row_start():
    shared = shared_regions(FlatRange(7, 19), Box(0, 5, 1, 4), 5)
    assert shared == (
        Box(1, 2, 2, 4),
        Box(2, 4, 1, 4),
    )
    assert shared_regions(FlatRange(7, 18), Box(0, 5, 1, 4), 5) == (
        Box(1, 2, 2, 4),
        Box(2, 3, 1, 4),
        Box(3, 4, 1, 3),
    )


@st.composite
def holdings(draw):
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["flat", "rows", "cols", "team"]))
    world_size = draw(st.integers(1, 6))
    if kind == "team":
        by_rows = draw(st.booleans())
        most = min(world_size, rows if by_rows else cols)
        ranks = draw(st.sets(st.integers(0, world_size - 1), min_size=1, max_size=most))
        team = tuple(sorted(ranks))
        layout = team_blocks(team, rows, cols, world_size, by_rows=by_rows)
        return layout, rows, cols
    top = {"flat": rows * cols, "rows": rows, "cols": cols}[kind]
    inner = draw(st.lists(st.integers(0, top), max_size=5))
    edges = [0, *sorted(inner), top]
    make = {
        "flat": FlatRange,
        "rows": lambda a, b: Box(a, b, 0, cols),
        "cols": lambda a, b: Box(0, rows, a, b),
    }[kind]
    return Layout.of(make(a, b) for a, b in zip(edges, edges[1:])), rows, cols


@settings(max_examples=500)
@given(st.data(), holdings())
def test_a_layout_finds_every_entry_of_a_region_at_its_holder(data, case):
    layout, rows, cols = case
    wanted = data.draw(regions(rows, cols))
    found = {}
    for piece, shared, ranks in layout.overlapping(wanted, cols):
        assert list(ranks) == list(layout.holders(ranks[0]))
        assert layout[ranks[0]] == piece
        for entry in entries(shared, cols):
            assert entry not in found
            found[entry] = ranks[0]
    assert sorted(found) == sorted(entries(wanted, cols))
    for entry, rank in found.items():
        assert entry in entries(layout[rank], cols)


def test_ranks_outside_a_team_hold_nothing():
    blocks = team_blocks((1, 3, 4), 7, 2, 6, by_rows=True)
    assert list(blocks) == [
        EMPTY,
        Box(0, 2, 0, 2),
        EMPTY,
        Box(2, 4, 0, 2),
        Box(4, 7, 0, 2),
        EMPTY,
    ]
    assert [region.numel for region in on_team((1, 3, 4), 2, 2, 6)] == [
        0,
        4,
        0,
        4,
        4,
        0,
    ]
