"""What moves between ranks, counted entry by entry and by formula."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exchanges import exchanges, mask

from sharded_adadiag.plan import exchange_plan
from sharded_adadiag.plan.blocks import team_blocks
from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Box, FlatRange, shared_regions

cases = st.one_of(exchanges(), exchanges(back_of_a_cut=True))


def entries_moved(hop, shape):
    """Entries that some rank has and that are wanted by ranks that do not have them."""
    covered = sum(mask(region, shape) for region, _ in hop.source.pieces) > 0
    return sum(
        int((covered & mask(wanted, shape) & ~mask(held, shape)).sum())
        for held, wanted in zip(hop.source, hop.target)
    )


@settings(max_examples=300)
@given(cases)
def test_moved_bytes_are_those_of_the_entries_that_ranks_lack(case):
    plan, shapes = case
    for hop, shape in zip(plan.hops, shapes):
        assert hop.moved_bytes == entries_moved(hop, shape) * hop.itemsize


def test_moved_bytes_are_right_where_some_pieces_have_more_holders_than_others():
    left, right = Box(0, 4, 0, 3), Box(0, 4, 3, 6)
    target = Layout.of([left, left, right, Box(0, 0, 0, 0)])
    source = Layout(4, ((Box(1, 3, 2, 5), range(3, 4)),))
    hop = Move(6, source, target, 4)
    assert hop.moved_bytes == 4 * (2 * 2 + 4) == 4 * entries_moved(hop, (4, 6))


@settings(max_examples=200)
@given(cases)
def test_what_a_rank_sends_is_what_the_other_expects_and_never_nothing(case):
    plan, _ = case
    moved = expected = 0
    for rank in range(plan.world_size):
        sent = plan.sent(rank)
        assert [chunk.rank for chunk in sent] == sorted({c.rank for c in sent} - {rank})
        assert plan.prepare(rank).sent == {c.rank: c.nbytes for c in sent}
        expected += len(plan.received(rank))
        for chunk in sent:
            assert chunk.spans
            (same,) = [c for c in plan.received(chunk.rank) if c.rank == rank]
            assert (chunk.spans, chunk.nbytes) == (same.spans, same.nbytes)
            moved += sum(span.stop - span.start for span in chunk.spans)
            expected -= 1
    assert expected == 0
    assert moved == sum(hop.moved_bytes for hop in plan.hops)
    assert plan.is_local is (moved == 0)


def shards(kind, rows, cols, world_size, replicas=1):
    """FSDP's shards, each on some ranks that are as far apart as there are shards."""
    parts = world_size // replicas
    pieces = []
    for i in range(parts):
        a, b = rows * i // parts, rows * (i + 1) // parts
        region = Box(a, b, 0, cols) if kind == "rows" else FlatRange(a * cols, b * cols)
        pieces.append((region, range(i, world_size, parts)))
    return Layout(world_size, tuple(pieces))


@pytest.mark.parametrize("kind,replicas", [("rows", 1), ("flat", 1), ("rows", 8)])
def test_thousands_of_shards_cost_no_more_than_the_blocks_on_the_other_side(
    kind, replicas, monkeypatch
):
    rows, cols, size = 8192, 28672, 4096
    storage = shards(kind, rows, cols, size, replicas)
    team = team_blocks(range(100, 120), rows, cols, size, by_rows=False)
    cut = Layout(
        size,
        tuple((Box(0, rows, b.col_start, b.col_start + 64), r) for b, r in team.pieces),
    )
    calls = []

    def counting(*args):
        calls.append(args)
        return shared_regions(*args)

    monkeypatch.setattr(exchange_plan, "shared_regions", counting)
    there = ExchangePlan(size, (Move(cols, storage, cut, 4),))
    back = there.inverse([4])
    # Each of the 20 has one replica of one shard itself, of 2 or 16 rows.
    at_hand = 20 * 64 * (rows * replicas // size)
    numel = 20 * 64 * rows
    assert there.hops[0].moved_bytes == 4 * (numel - at_hand)
    assert back.hops[0].moved_bytes == 4 * (replicas * numel - at_hand)
    assert len(calls) == 40
    assert (there.messages_sent(0), there.messages_sent(100)) == (
        (20, 19) if replicas == 1 else (2, 2)
    )
    assert back.messages_sent(0) == 0 and back.messages_sent(100) == 4095
