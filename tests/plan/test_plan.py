"""Plans are made of integers: no process group is needed to test them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_adadiag.plan.blocks import even_blocks
from sharded_adadiag.plan.cost import MatrixCost, refresh_cost, step_cost
from sharded_adadiag.plan.distribution import Candidate, choose, step_bytes
from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import (
    EMPTY,
    Layout,
    everywhere,
    only_on,
    tiling_error,
)
from sharded_adadiag.plan.layout import MatrixLayout, Storage
from sharded_adadiag.plan.ownership import assign_owners
from sharded_adadiag.plan.regions import Box, FlatRange, full, intersect
from sharded_adadiag.plan.route import broadcast_route, owner_route

LLAMA = {  # hidden, feed-forward, layers: section 5.2 of the paper, GaLore's shapes
    "60M": (512, 1376, 8),
    "130M": (768, 2048, 12),
    "350M": (1024, 2736, 24),
    "1.3B": (2048, 5461, 24),
}


def llama_costs(size, sides, basis="svd", state_itemsize=4):
    hidden, ffn, layers = LLAMA[size]
    shapes = ([(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]) * layers
    costs = []
    for m, n in shapes:
        left = sides == "two" or m <= n
        right = sides == "two" or m > n
        numel = 2 * m * n + m * m * left + n * n * right
        costs.append(
            MatrixCost(
                step_cost(m, n, left=left, right=right),
                refresh_cost(m, n, left=left, right=right, basis=basis),
                200,
                state_itemsize * numel,
            )
        )
    return costs


def load_ratios(costs, owners, world_size):
    for weight in (lambda c: c.per_step, lambda c: c.state_bytes):
        loads = [0.0] * world_size
        for cost, owner in zip(costs, owners):
            loads[owner] += weight(cost)
        yield max(loads) / (sum(loads) / world_size)


def can_be_balanced(costs, world_size, ratio):
    """Whether any assignment of two kinds of matrices is within the ratio."""
    kinds = sorted({(c.per_step, c.state_bytes) for c in costs})
    small, large = kinds
    counts = [sum((c.per_step, c.state_bytes) == k for c in costs) for k in kinds]
    limits = [
        ratio * sum((c.per_step, c.state_bytes)[k] for c in costs) / world_size
        for k in (0, 1)
    ]
    most_small = {}
    for a, b in itertools.product(range(counts[0] + 1), range(counts[1] + 1)):
        if all(a * small[k] + b * large[k] <= limits[k] for k in (0, 1)):
            most_small[b] = max(most_small.get(b, 0), a)
    reachable = {0: 0}
    for _ in range(world_size):
        further = {}
        for (done, smalls), (b, a) in itertools.product(
            reachable.items(), most_small.items()
        ):
            if done + b <= counts[1]:
                further[done + b] = max(further.get(done + b, 0), smalls + a)
        reachable = further
    return reachable.get(counts[1], -1) >= counts[0]


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("size", LLAMA)
def test_the_most_loaded_rank_is_within_ten_percent_of_the_mean(size, sides):
    """Work and state alike, wherever there are 4 matrices a rank and it can be done.

    It cannot for a few world sizes (60M two-sided on 14 ranks, say): there an
    exhaustive search over what a rank may own shows that no assignment does it.
    """
    costs = llama_costs(size, sides)
    impossible = []
    for world_size in range(1, len(costs) // 4 + 1):
        owners = assign_owners(costs, world_size)
        worst = max(load_ratios(costs, owners, world_size))
        if worst > 1.10:
            assert not can_be_balanced(costs, world_size, 1.10), (world_size, worst)
            assert worst < 1.15, (world_size, worst)
            impossible.append(world_size)
    assert len(impossible) <= 3


def test_ownership_is_a_function_of_its_inputs():
    costs = llama_costs("60M", "one")
    assert assign_owners(costs, 3) == assign_owners(list(costs), 3)


def test_more_ranks_than_matrices_leaves_some_without_any():
    owners = assign_owners(llama_costs("60M", "one")[:3], 8)
    assert len(set(owners)) == 3


@st.composite
def boxes(draw, rows, cols):
    a, b = sorted(draw(st.tuples(*[st.integers(0, rows)] * 2)))
    c, d = sorted(draw(st.tuples(*[st.integers(0, cols)] * 2)))
    return Box(a, b, c, d)


def entries(region, cols):
    if isinstance(region, FlatRange):
        return set(range(region.start, region.stop))
    return {
        r * cols + c
        for r in range(region.row_start, region.row_stop)
        for c in range(region.col_start, region.col_stop)
    }


@given(boxes(5, 4), boxes(5, 4))
def test_boxes_intersect_as_sets_of_entries_do(a, b):
    shared = intersect(a, b, 4)
    both = entries(a, 4) & entries(b, 4)
    assert (entries(shared, 4) if shared else set()) == both


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.integers(0, 5))
def test_flat_ranges_and_rows_intersect_as_sets_of_entries_do(s, t, a, b):
    flat, rows = FlatRange(min(s, t), max(s, t)), Box(min(a, b), max(a, b), 0, 4)
    shared = intersect(flat, rows, 4)
    both = entries(flat, 4) & entries(rows, 4)
    assert (entries(shared, 4) if shared else set()) == both


def test_a_flat_range_and_a_narrow_box_share_no_region():
    with pytest.raises(ValueError, match="no flat range"):
        intersect(FlatRange(0, 7), Box(0, 2, 1, 3), 4)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_even_blocks_tile_the_matrix(rows, cols, parts, by_rows):
    blocks = even_blocks(rows, cols, parts, by_rows=by_rows)
    assert len(blocks) == parts
    assert tiling_error(blocks, rows, cols) is None
    sizes = [b.shape[0 if by_rows else 1] for b in blocks]
    assert max(sizes) - min(sizes) <= 1


def flat_layout(rows, cols, cuts):
    edges = [0, *sorted(cuts), rows * cols]
    return Layout.of(FlatRange(a, b) for a, b in zip(edges, edges[1:]))


def chunked_rows(rows, cols, world_size):
    """torch.chunk's rows, as FSDP2 shards: trailing ranks may have none."""
    size = -(-rows // world_size)
    edges = [min(size * i, rows) for i in range(world_size + 1)]
    return Layout.of(Box(a, b, 0, cols) for a, b in zip(edges, edges[1:]))


@st.composite
def layouts(draw, rows, cols, world_size):
    kind = draw(st.sampled_from(["rows", "cols", "flat", "replicas", "owner"]))
    if kind == "rows":
        return chunked_rows(rows, cols, world_size)
    if kind == "cols":
        return even_blocks(rows, cols, world_size, by_rows=False)
    if kind == "flat":
        cut = st.integers(0, rows * cols)
        cuts = draw(st.lists(cut, min_size=world_size - 1, max_size=world_size - 1))
        return flat_layout(rows, cols, cuts)
    if kind == "replicas":
        return everywhere(rows, cols, world_size)
    owner = draw(st.integers(0, world_size - 1))
    return only_on(owner, rows, cols, world_size)


@st.composite
def hops(draw):
    world_size = draw(st.integers(1, 4))
    matrices = []
    for _ in range(draw(st.integers(1, 3))):
        rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        one = draw(layouts(rows, cols, world_size))
        other = draw(layouts(rows, cols, world_size))
        size = draw(st.sampled_from([2, 4, 8]))
        matrices.append((rows, cols, Move(cols, one, other, size)))
    return world_size, matrices


@settings(max_examples=300)
@given(hops())
def test_every_target_entry_arrives_exactly_once_and_the_way_back_mirrors_it(case):
    world_size, matrices = case
    plan = ExchangePlan(world_size, tuple(hop for *_, hop in matrices))
    for plan_, ends in (
        (plan, "target"),
        (plan.inverse([8] * len(matrices)), "source"),
    ):
        for i, (_, cols, hop) in enumerate(matrices):
            for rank in range(world_size):
                got = [
                    e
                    for _, region in plan_.hops[i].arriving(rank)
                    for e in entries(region, cols)
                ]
                assert len(got) == len(set(got))
                assert set(got) == entries(getattr(hop, ends)[rank], cols)


@settings(max_examples=200)
@given(hops())
def test_what_a_rank_sends_is_what_the_other_expects(case):
    world_size, matrices = case
    plan = ExchangePlan(world_size, tuple(hop for *_, hop in matrices))
    moved = 0
    for rank in range(world_size):
        for chunk in plan.sent(rank):
            (expected,) = [c for c in plan.received(chunk.rank) if c.rank == rank]
            assert (chunk.spans, chunk.nbytes) == (expected.spans, expected.nbytes)
            moved += sum(span.stop - span.start for span in chunk.spans)
    assert moved == sum(hop.moved_bytes for *_, hop in matrices)
    assert plan.is_local is (moved == 0)


@settings(max_examples=200)
@given(hops())
def test_slots_are_aligned_disjoint_and_inside_their_chunk(case):
    world_size, matrices = case
    plan = ExchangePlan(world_size, tuple(hop for *_, hop in matrices))
    for chunk in itertools.chain(*map(plan.sent, range(world_size))):
        assert chunk.nbytes % 8 == 0
        end = 8
        for span in chunk.spans:
            assert span.start == end
            assert span.start % plan.hops[span.item].itemsize == 0
            end = span.stop
        assert end <= chunk.nbytes


@given(st.lists(st.sampled_from([Box(0, 1, 0, 3), FlatRange(3, 6), EMPTY]), max_size=9))
def test_a_layout_tells_of_every_rank_what_it_was_made_of(regions):
    layout = Layout.of(regions)
    assert [r if r.numel else EMPTY for r in layout] == regions
    assert (
        layout == Layout.of(tuple(regions)) and len({layout, Layout.of(regions)}) == 1
    )
    for rank, region in enumerate(regions):
        same = [r for r, other in enumerate(regions) if other == region != EMPTY]
        assert list(layout.holders(rank)) == same


def test_pieces_that_overlap_or_leave_a_gap_are_refused_by_name():
    for regions in (
        (Box(0, 2, 0, 3), Box(1, 4, 0, 3)),
        (Box(0, 3, 0, 2), Box(2, 4, 0, 3)),
        (Box(0, 2, 0, 3), EMPTY),
        (FlatRange(0, 7), FlatRange(6, 11)),
        (FlatRange(0, 7), FlatRange(8, 13)),
    ):
        with pytest.raises(ValueError, match=r"layers.0.weight: .*4 x 3"):
            MatrixLayout("layers.0.weight", 4, 3, Layout.of(regions))


def test_storage_is_recognised():
    whole = full(6, 4)
    kinds = {
        Storage.REPLICATED: everywhere(6, 4, 3),
        Storage.ROWS: chunked_rows(6, 4, 4),
        Storage.COLS: even_blocks(6, 4, 2, by_rows=False),
        Storage.PIECES: flat_layout(6, 4, [5, 11]),
    }
    for kind, layout in kinds.items():
        assert MatrixLayout("w", 6, 4, layout).storage is kind
    # One rank that holds everything is no replica of the others.
    assert MatrixLayout("w", 6, 4, Layout.of((whole, EMPTY))).storage is Storage.ROWS


def routes(rows, cols, layout, left, right, basis="svd"):
    matrix = MatrixLayout("w", rows, cols, layout)
    sides = {"left": left, "right": right}
    return (
        matrix,
        owner_route(matrix, 0, **sides),
        broadcast_route(matrix, 0, basis=basis, **sides),
    )


def test_rotating_the_side_that_is_not_sharded_needs_no_communication():
    tall, _, route = routes(12, 4, chunked_rows(12, 4, 3), False, True)
    assert step_bytes(tall, route) == 0
    wide, _, route = routes(
        4, 12, even_blocks(4, 12, 3, by_rows=False), True, False, "eigh"
    )
    assert step_bytes(wide, route) == 0
    assert route.basis_from == "gram"


def test_an_owner_moves_two_matrices_worth_of_elements_less_its_own_part():
    for world_size in (2, 3, 4):
        layout = even_blocks(12, 8, world_size, by_rows=True)
        matrix, route, _ = routes(12, 8, layout, True, False)
        away = matrix.numel * (world_size - 1) // world_size
        assert step_bytes(matrix, route) == 2 * 4 * away


def candidate(rows, cols, world_size, by_rows=True):
    layout = even_blocks(rows, cols, world_size, by_rows=by_rows)
    left = rows <= cols
    matrix, _, other = routes(rows, cols, layout, left, not left)
    rotation = 4 * min(rows, cols) ** 2
    state = 8 * rows * cols + rotation
    return Candidate(matrix, other, rotation, state, 200)


def test_auto_broadcasts_where_traffic_is_over_budget_and_memory_allows():
    tall = [candidate(64, 8, 2) for _ in range(4)]
    # Three of four bring the traffic under the budget; the fourth saves its memory.
    assert choose(tall, 2) == ["broadcast"] * 3 + ["owner"]
    # The rotations of square matrices would not fit a quarter of the state.
    square = [candidate(64, 64, 2) for _ in range(4)]
    assert choose(square, 2) == ["owner"] * 4
    # With many ranks an owner's traffic is small beside the framework's own.
    assert choose([candidate(64, 8, 16) for _ in range(32)], 16) == ["owner"] * 32


def test_auto_leaves_replicas_to_their_owners():
    matrix = MatrixLayout("w", 64, 8, everywhere(64, 8, 2))
    sides = {"left": False, "right": True}
    other = broadcast_route(matrix, 0, basis="svd", **sides)
    assert choose([Candidate(matrix, other, 256, 4352, 200)], 2) == ["owner"]


@pytest.mark.parametrize("basis", ["svd", "eigh"])
@pytest.mark.parametrize("left,right", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "shape,layout",
    [((1, 4), (Box(0, 1, 0, 4), EMPTY)), ((9, 1), (full(9, 1), Box(0, 9, 1, 1)))],
    ids=["wide", "tall"],
)
def test_a_rank_without_entries_has_sums_of_the_same_length_as_the_others(
    shape, layout, left, right, basis
):
    """One rank holds the whole matrix, so its storage is row blocks, whoever cut it."""
    _, _, route = routes(*shape, Layout.of(layout), left, right, basis)
    working = [stage for stage in route.stages if stage.split != "none"]
    assert working
    for stage in working:
        undivided = 1 if stage.split == "rows" else 0
        assert {box.shape[undivided] for box in stage.layout} == {shape[undivided]}
