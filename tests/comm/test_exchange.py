"""Exchanges between ranks against what numpy says of whole matrices."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exchanges import entries, exchanges, layouts, mask

from sharded_adadiag.comm.collectives import SingleProcess, communicator
from sharded_adadiag.comm.exchange import Exchange, window
from sharded_adadiag.plan import exchange_plan
from sharded_adadiag.plan.blocks import even_blocks
from sharded_adadiag.plan.exchange_plan import HEADER_BYTES, ExchangePlan, Move
from sharded_adadiag.plan.geometry import Layout, everywhere, only_on
from sharded_adadiag.plan.regions import Box, FlatRange, full
from sharded_adadiag.testing.ranks import run_processes, run_threads

CPU = torch.device("cpu")
WIRE = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def matrices(shapes):
    """Of small whole numbers, which no dtype rounds."""
    rng = np.random.default_rng(0)
    return [rng.integers(-99, 99, shape).astype(np.float64) for shape in shapes]


def pieces_of(plan, whole, rank, dtype=torch.float32):
    return [
        torch.from_numpy(entries(m, hop.source[rank]).copy()).to(dtype)
        for m, hop in zip(whole, plan.hops)
    ]


def wires(plan):
    return [WIRE[hop.itemsize] for hop in plan.hops]


def start(exchange, plan, pieces, **options):
    work = [torch.float32] * len(pieces)
    return exchange.start(plan, pieces, wires(plan), work, device=CPU, **options)


def of_this_rank():
    return Exchange(communicator(dist.group.WORLD))


def senders(plan, shapes, rank):
    """The other ranks that have data for a rank, found entry by entry."""
    found = set()
    for hop, shape in zip(plan.hops, shapes):
        wanted = mask(hop.target[rank], shape)
        for region, ranks in hop.source.pieces:
            if rank not in ranks and (mask(region, shape) & wanted).any():
                found.add(ranks[rank % len(ranks)])
    return found


def assert_new_pieces(plan, whole, rank, pieces):
    for hop, matrix, piece in zip(plan.hops, whole, pieces):
        assert piece.dtype == torch.float32
        wanted = entries(matrix, hop.target[rank])
        assert piece.shape == wanted.shape
        np.testing.assert_array_equal(piece.numpy(), wanted)


def moved(rank, plan, shapes, into):
    exchange, whole = of_this_rank(), matrices(shapes)
    for k in range(2):  # the second finds lists and buffers made
        pieces = pieces_of(plan, [matrix + k for matrix in whole], rank)
        found, failed = start(exchange, plan, pieces, into=into).finish()
        assert_new_pieces(plan, [matrix + k for matrix in whole], rank, found)
        assert failed == {}


@pytest.mark.parametrize("into", ["", "gathered"])
@settings(max_examples=60)
@given(case=exchanges())
def test_every_rank_gets_the_entries_of_its_target_regions(into, case):
    run_threads(case[0].world_size, moved, *case, into)


def moved_in_parts(rank, plan, shapes):
    whole = matrices(shapes)
    pending = start(of_this_rank(), plan, pieces_of(plan, whole, rank), into="back")
    found, _ = pending.parts()
    for hop, matrix, parts in zip(plan.hops, whole, found):
        seen = np.zeros(matrix.shape, dtype=int)
        for region, part in parts:
            assert part.dtype == torch.float32
            np.testing.assert_array_equal(part.numpy(), entries(matrix, region))
            seen += mask(region, matrix.shape)
        covered = sum(mask(region, matrix.shape) for region, _ in hop.source.pieces)
        expected = mask(hop.target[rank], matrix.shape) * (covered > 0)
        np.testing.assert_array_equal(seen, expected)


@settings(max_examples=60)
@given(exchanges(back_of_a_cut=True))
def test_parts_are_what_the_source_covers_of_each_target_region_once(case):
    run_threads(case[0].world_size, moved_in_parts, *case)


def test_a_target_that_is_only_partly_covered_cannot_be_put_together():
    whole, part = Layout.of([full(3, 4)]), Layout.of([Box(0, 3, 1, 3)])
    plan = ExchangePlan(1, (Move(4, part, whole, 4),))
    exchange = Exchange(SingleProcess())
    with pytest.raises(AssertionError, match="only a part"):
        start(exchange, plan, [torch.ones(3, 2)]).finish()
    (((region, piece),),), _ = start(exchange, plan, [torch.ones(3, 2)]).parts()
    assert region == Box(0, 3, 1, 3) and piece.shape == (3, 2)


def under_way_at_once(rank, cases):
    exchange = of_this_rank()
    wholes = [matrices(shapes) for _, shapes in cases]
    flying = [
        start(exchange, plan, pieces_of(plan, whole, rank), into=f"round {i}")
        for i, ((plan, _), whole) in enumerate(zip(cases, wholes))
    ]
    results = [pending.finish()[0] for pending in reversed(flying)]
    for (plan, _), whole, found in zip(cases, wholes, reversed(results)):
        assert_new_pieces(plan, whole, rank, found)


@settings(max_examples=30)
@given(st.integers(2, 6).flatmap(lambda n: st.lists(exchanges(n), min_size=2)))
def test_exchanges_under_way_at_once_do_not_disturb_each_other(cases):
    run_threads(cases[0][0].world_size, under_way_at_once, cases)


class Late:
    """A communicator whose bytes arrive when they are waited for."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.device = comm.device

    def start_all_to_all(self, *args):
        return SimpleNamespace(wait=lambda: self.comm.start_all_to_all(*args).wait())


def finished_late(rank, plan, whole):
    exchange = Exchange(Late(communicator(dist.group.WORLD)))
    first = start(exchange, plan, pieces_of(plan, whole, rank), into="first")
    second = start(exchange, plan, pieces_of(plan, whole, rank), into="second")
    assert_new_pieces(plan, whole, rank, first.finish()[0])
    parts, _ = second.parts()
    for region, part in itertools.chain(*parts):
        np.testing.assert_array_equal(part.numpy(), entries(whole[0], region))


def test_what_comes_is_read_when_it_has_come():
    run_threads(3, finished_late, swapped(3), matrices([(4, 6)]))


def gloo_under_way_at_once(rank):
    cases = [(swapped(3), [(4, 6)]), (one_to_one(3), [(4, 6)])]
    under_way_at_once(rank, cases)


def swapped(world_size):
    """Row blocks to column blocks: everybody sends to everybody."""
    rows = even_blocks(4, 6, world_size, by_rows=True)
    cols = even_blocks(4, 6, world_size, by_rows=False)
    return ExchangePlan(world_size, (Move(6, rows, cols, 4),))


def one_to_one(world_size):
    """The whole matrix from rank 0 to rank 1; the others have nothing to do."""
    ends = (only_on(rank, 4, 6, world_size) for rank in (0, 1))
    return ExchangePlan(world_size, (Move(6, *ends, 4),))


@pytest.mark.multiprocess
def test_two_exchanges_under_way_on_gloo_processes_one_of_them_without_most_ranks():
    run_processes(3, gloo_under_way_at_once)


def test_a_name_is_not_used_again_before_its_exchange_has_ended():
    whole, rows = everywhere(2, 2, 1), Layout.of([FlatRange(0, 4)])
    plan = ExchangePlan(1, (Move(2, whole, rows, 4),))
    exchange, pieces = Exchange(SingleProcess()), [torch.ones(2, 2)]
    first = start(exchange, plan, pieces, into="a")
    with pytest.raises(AssertionError, match="a is still under way"):
        start(exchange, plan, pieces, into="a")
    first.finish()
    second = start(exchange, plan, pieces, into="a")
    (again,), _ = second.finish()
    (other,), _ = start(exchange, plan, pieces, into="b").finish()
    (third,), _ = start(exchange, plan, pieces, into="a").finish()
    assert third.data_ptr() == again.data_ptr() != other.data_ptr()
    with pytest.raises(AssertionError, match="ends once"):
        second.finish()


def test_results_without_a_name_have_memory_of_their_own():
    plan = ExchangePlan(
        1, (Move(2, everywhere(2, 2, 1), Layout.of([FlatRange(0, 4)]), 4),) * 2
    )
    exchange, pieces = Exchange(SingleProcess()), [torch.ones(2, 2)] * 2
    (one, two), _ = start(exchange, plan, pieces).finish()
    assert one.untyped_storage().nbytes() == two.untyped_storage().nbytes() == 16


def test_a_piece_that_neither_moves_nor_changes_dtype_is_the_given_one():
    plan = ExchangePlan(1, (Move(3, everywhere(2, 3, 1), everywhere(2, 3, 1), 4),))
    for piece in (torch.ones(2, 3), torch.ones(3, 2).t()):
        (found,), _ = start(Exchange(SingleProcess()), plan, [piece]).finish()
        assert found is piece
    (found,), _ = start(Exchange(SingleProcess()), plan, [piece.double()]).finish()
    assert found.dtype == torch.float32


def transposed(rank):
    """Pieces that are columns in memory."""
    plan, whole = swapped(2), matrices([(4, 6)])
    (piece,) = pieces_of(plan, whole, rank)
    odd = piece.t().contiguous().t()
    assert not odd.is_contiguous()
    found, _ = start(of_this_rank(), plan, [odd]).finish()
    assert_new_pieces(plan, whole, rank, found)


def test_pieces_may_lie_in_memory_in_any_order():
    run_threads(2, transposed)


def summed(rank, owner, terms):
    size = len(terms)
    hop = Move(3, everywhere(3, 3, size), only_on(owner, 3, 3, size), 4, summed=True)
    plan = ExchangePlan(size, (hop,))
    (total,), _ = start(of_this_rank(), plan, [torch.from_numpy(terms[rank])]).finish()
    return total.numpy()


@pytest.mark.parametrize("owner", [0, 2])
def test_summands_are_added_in_rank_order_after_the_owners_own(owner):
    terms = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
    order = [owner, *(rank for rank in range(5) if rank != owner)]
    expected = functools.reduce(np.add, (terms[rank] for rank in order))
    backwards = functools.reduce(np.add, (terms[rank] for rank in reversed(order)))
    assert (expected != backwards).any()
    results = run_threads(5, summed, owner, terms)
    np.testing.assert_array_equal(results[owner], expected)
    assert all(r.size == 0 for rank, r in enumerate(results) if rank != owner)


def told(rank, plan, shapes, failed):
    pieces = pieces_of(plan, matrices(shapes), rank)
    exchange = of_this_rank()
    word = 100 + rank if rank in failed else 0
    _, finished = start(exchange, plan, pieces, status=word).finish()
    _, parted = start(exchange, plan, pieces, status=word).parts()
    assert finished == parted
    return finished


@settings(max_examples=40)
@given(exchanges(), st.sets(st.integers(0, 7)))
def test_a_status_reaches_those_who_get_data_and_its_own_rank_and_nobody_else(
    case, failed
):
    plan, shapes = case
    for rank, found in enumerate(run_threads(plan.world_size, told, *case, failed)):
        from_whom = senders(plan, shapes, rank) | {rank}
        assert found == {other: 100 + other for other in from_whom & failed}
        assert list(found) == sorted(found)


def told_later(rank, plan, shapes, failed):
    """As on an accelerator: two exchanges, then their status words at once."""
    pieces = pieces_of(plan, matrices(shapes), rank)
    exchange = of_this_rank()
    for word in (0, 100 + rank if rank in failed else 0):
        pending = start(exchange, plan, pieces, status=word)
        pending.unread = exchange._unread
        pending.finish()
    return exchange.unread_statuses(), exchange.unread_statuses()


@settings(max_examples=20)
@given(exchanges(), st.sets(st.integers(0, 7)))
def test_statuses_left_on_an_accelerator_are_read_together(case, failed):
    plan, shapes = case
    results = run_threads(plan.world_size, told_later, *case, failed)
    for rank, (found, again) in enumerate(results):
        from_whom = senders(plan, shapes, rank) - {rank}
        assert found == {other: 100 + other for other in from_whom & failed}
        assert again == {}


class Counting:
    """A communicator that notes the bytes to each rank in each all-to-all."""

    def __init__(self, comm):
        self.comm, self.sizes = comm, []

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def start_all_to_all(self, target, source, received, sent):
        assert sum(sent) == source.nbytes and sum(received) == target.nbytes
        self.sizes.append(sent)
        return self.comm.start_all_to_all(target, source, received, sent)


def counted(rank, plan, shapes):
    comm = Counting(communicator(dist.group.WORLD))
    start(Exchange(comm), plan, pieces_of(plan, matrices(shapes), rank)).finish()
    return comm.sizes


@settings(max_examples=60)
@given(exchanges())
def test_bytes_and_messages_are_as_planned_and_go_only_to_those_who_get_data(case):
    plan, shapes = case
    sizes = run_threads(plan.world_size, counted, *case)
    if plan.is_local:
        assert sizes == [[]] * plan.world_size
        sizes = [[[0] * plan.world_size]] * plan.world_size
    total = messages = 0
    for rank, (sent,) in enumerate(sizes):
        assert plan.bytes_sent(rank) == sum(sent)
        assert plan.messages_sent(rank) == np.count_nonzero(sent)
        total += sum(sent)
        messages += np.count_nonzero(sent)
        for other in range(plan.world_size):
            assert (sent[other] > 0) == (rank in senders(plan, shapes, other))
    data = sum(hop.moved_bytes for hop in plan.hops)
    # With each message goes a status word, and up to 7 bytes fill it up.
    assert 0 <= total - data - HEADER_BYTES * messages <= 7 * messages


def twice_without_listing(rank, plan, shapes):
    exchange, whole = of_this_rank(), matrices(shapes)
    if rank == 0:
        plan.prepare(0)
    dist.barrier()
    start(exchange, plan, pieces_of(plan, whole, rank)).finish()
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(exchange_plan, "inside", None)
            patch.setattr(exchange_plan, "shared_regions", None)
            patch.setattr(Layout, "overlapping", None)
        dist.barrier()
        found, _ = start(exchange, plan, pieces_of(plan, whole, rank)).finish()
        dist.barrier()
    assert_new_pieces(plan, whole, rank, found)


def test_a_rank_lists_its_copies_once():
    run_threads(3, twice_without_listing, swapped(3), [(4, 6)])


@given(st.data())
def test_a_window_shows_a_region_of_a_piece_without_a_copy(data):
    rows, cols = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    matrix = np.arange(rows * cols).reshape(rows, cols)
    one, other = (data.draw(layouts(rows, cols, 3)) for _ in range(2))
    held = data.draw(st.sampled_from([piece for piece, _ in one.pieces]))
    piece = torch.from_numpy(entries(matrix, held).copy())
    for _, shared, _ in other.overlapping(held, cols):
        view = window(piece, held, shared, cols)
        np.testing.assert_array_equal(view.numpy(), entries(matrix, shared))
        assert view.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
    assert window(piece, held, Box(0, 0, 0, 0), cols).numel() == 0
