"""The number of slots that the plan takes."""

from collections import Counter

import pytest
from support.plans import hidden_shapes
from support.specs import row_shards, spec

from sharded_adadiag.algorithm.state import ADADIAG
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.schedule import slot_weight
from sharded_adadiag.plan.slot_count import LONGEST


def auto(shapes, ranks, **options):
    specs = [
        spec(f"w{i}", *shape, **{"refresh_slots": "auto", **options})
        for i, shape in enumerate(shapes)
    ]
    layouts = [row_shards(*shape, ranks=ranks) for shape in shapes]
    plan = Plan.of(specs, layouts, rule=ADADIAG, world_size=ranks)
    (count,) = {s.options.refresh_slots for s in plan.specs}
    return plan, count


def longest_slot(plan):
    work = Counter()
    for m in plan.matrices:
        weight = slot_weight(*m.shape, left=m.left, right=m.right)
        work.update(dict(m.cost.slots.shares(weight)))
    return max(work.values())


@pytest.mark.parametrize("model", ["60M", "1.3B"])
def test_one_process_has_the_fewest_slots_that_keep_the_longest_step_short(model):
    shapes = hidden_shapes(model)
    plan, count = auto(shapes, 1)
    step = sum(m.cost.step for m in plan.matrices)
    assert longest_slot(plan) <= (LONGEST - 1) * step
    layouts = [row_shards(*shape, ranks=1) for shape in shapes]
    half = [spec(f"w{i}", *s, refresh_slots=count // 2) for i, s in enumerate(shapes)]
    fewer = Plan.of(half, layouts, rule=ADADIAG, world_size=1)
    assert longest_slot(fewer) > (LONGEST - 1) * step


def test_many_ranks_have_few_slots():
    shapes = hidden_shapes("60M")
    counts = [auto(shapes, ranks)[1] for ranks in (1, 2, 8, 64)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1 < counts[0]


def test_there_are_no_more_slots_than_steps_and_one_without_a_period():
    shapes = hidden_shapes("60M")
    assert auto(shapes, 1, refresh_every=5)[1] == 4
    assert auto(shapes, 1, refresh_every=None)[1] == 1
    assert auto([(8, 8)] * 3, 1)[1] <= 3


def test_numbers_that_are_given_stay_and_what_comes_later_is_asked_by_itself():
    specs = [spec("a", 64, 64), spec("b", 64, 64, refresh_slots=3)]
    specs.append(spec("c", 64, 64, refresh_slots="auto"))
    layouts = [row_shards(64, 64, ranks=2)] * 3
    plan = Plan.of(specs, layouts, rule=ADADIAG, world_size=2)
    assert [s.options.refresh_slots for s in plan.specs[:2]] == [1, 3]
    more = [spec(f"d{i}", 64, 64, refresh_slots="auto") for i in range(8)]
    after = plan.extended(more, layouts[:1] * 8)
    assert after.specs[:3] == plan.specs
    assert isinstance(after.specs[3].options.refresh_slots, int)
