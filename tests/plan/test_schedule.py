"""Slots: which matrices are refreshed when, and by whom."""

from collections import Counter

import pytest
from support.plans import hidden_shapes, planned, row_shards
from support.specs import row_shards as stack_shards
from support.specs import spec

from sharded_adadiag.algorithm.state import ADADIAG
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.schedule import give_slots


def slots_of(plans):
    """The slot of each matrix, by its place in the list of parameters."""
    return {
        (m.index, m.share.first + i): slot
        for m in plans
        for slot, some in m.cost.slots.taken
        for i in some
    }


def test_a_matrix_goes_to_the_slot_with_least_so_far_of_those_of_its_number():
    assert give_slots([(3, 5), (3, 9), (3, 4), (3, 1), (3, 4)], {}) == [1, 0, 2, 1, 2]
    assert give_slots([(2, 1), (3, 1), (2, 1), (3, 1)], {}) == [0, 0, 1, 1]
    assert give_slots([(2, 1), (2, 1)], {(2, 0): 3}) == [1, 1]


@pytest.mark.parametrize("model", ["GPT", "60M", "1.3B"])
def test_slots_are_alike_in_work_and_the_same_on_every_number_of_ranks(model):
    shapes = hidden_shapes(model)
    found = []
    for ranks in (1, 2, 8, 64):
        plans = planned(shapes, row_shards(shapes, ranks), refresh_slots=8)
        found.append(slots_of(plans))
    assert all(slots == found[0] for slots in found)
    work = Counter()
    for m in plans:
        work[found[0][m.key]] += m.cost.refresh
    largest = max(m.cost.refresh for m in plans)
    assert len(work) == 8
    assert max(work.values()) - min(work.values()) <= largest


def test_experts_and_blocks_of_rows_have_slots_as_if_they_were_parameters():
    apart = [spec(f"e{i}", 64, 96, refresh_slots=4) for i in range(6)]
    apart += [
        spec(f"b{i}", rows, 96, refresh_slots=4) for i, rows in enumerate((64, 8))
    ]
    joined = [
        spec("e", 6, 64, 96, refresh_slots=4, batch_dims=1),
        spec("b", 72, 96, refresh_slots=4, split_rows=(64, 8)),
    ]

    def slots(specs, ranks):
        layouts = []
        for s in specs:
            rows, cols = s.stored
            layouts.append(stack_shards(rows, cols, ranks=ranks))
        plan = Plan.of(specs, layouts, rule=ADADIAG, world_size=ranks)
        return [slot for _, slot in sorted(slots_of(plan.matrices).items())]

    want = slots(apart, 1)
    assert set(want) == set(range(4))
    for ranks in (1, 2, 3, 8):
        assert slots(joined, ranks) == want


@pytest.mark.parametrize("distribution", ["owner", "auto", "broadcast"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_makes_most_bases_of_a_slot(ranks, distribution):
    shapes = hidden_shapes("60M")
    plans = planned(
        shapes,
        row_shards(shapes, ranks),
        distribution=distribution,
        refresh_slots=8,
    )
    slots, loads = slots_of(plans), Counter()
    for m in plans:
        loads[slots[m.key], m.route.owner] += m.cost.refresh
    largest = max(m.cost.refresh for m in plans)
    for slot in range(8):
        each = [loads[slot, rank] for rank in range(ranks)]
        # Of two shapes: a rank may have one matrix more of each.
        assert max(each) - min(each) <= 1.5 * largest, (slot, each)


def test_owners_are_as_even_with_slots_as_without():
    shapes = hidden_shapes("60M")
    layouts = row_shards(shapes, 3)
    without, with_slots = (
        planned(shapes, layouts, distribution="owner", refresh_slots=count)
        for count in (1, 8)
    )
    for what in ("step", "refresh", "state_bytes"):
        sums = []
        for plans in (without, with_slots):
            by_rank = Counter()
            for m in plans:
                by_rank[m.route.owner] += getattr(m.cost, what)
            sums.append(by_rank)
        assert sums[0] == sums[1], what


def test_what_is_planned_later_keeps_the_slots_of_what_was_there():
    first = [spec(f"a{i}", 8, 8, refresh_slots=2) for i in range(3)]
    more = [spec(f"b{i}", 8, 8, refresh_slots=2) for i in range(3)]
    layouts = [stack_shards(8, 8, ranks=2)] * 3
    before = Plan.of(first, layouts, rule=ADADIAG, world_size=2)
    after = before.extended(more, layouts)
    slots = slots_of(after.matrices)
    assert slots_of(before.matrices) == {k: s for k, s in slots.items() if k[0] < 3}
    assert sorted(slots.values()) == [0, 0, 0, 1, 1, 1]
