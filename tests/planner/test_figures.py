"""Figures of plans against the same computed entry by entry."""

import pytest
from support.decoders import TINY_MODEL

from sharded_adadiag.plan.report import step_work
from sharded_adadiag.planner.figures import figures_of, refresh_work, sample
from sharded_adadiag.planner.mesh import Mesh
from sharded_adadiag.planner.models import named_model
from sharded_adadiag.planner.request import Request, answer
from sharded_adadiag.planner.table import number, size


def made(ranks=4, model=TINY_MODEL, **request):
    return answer(Request(model, Mesh(ranks), **request)).plan


@pytest.mark.parametrize("distribution", ["owner", "broadcast", "auto"])
def test_efficiency_is_mean_work_over_that_of_the_busiest_in_each_round(distribution):
    plan = made(model=named_model("llama-60m"), distribution=distribution)
    waited = 0
    for some in plan.rounds:
        busy = [0.0] * plan.world_size
        for part in some.parts:
            for rank, region in enumerate(part.layouts[-1]):
                share = region.numel / part.matrix.view.numel
                busy[rank] += part.matrix.cost.step * share
        waited += max(busy)
    mean = sum(m.cost.step for m in plan.matrices) / plan.world_size
    figures = figures_of(plan)
    assert figures.step_efficiency == pytest.approx(mean / waited, rel=1e-3)
    assert figures.work_max == max(step_work(plan))
    assert figures.busiest == step_work(plan).index(figures.work_max)


def test_refresh_work_is_that_of_the_heads():
    plan = made()
    work = refresh_work(plan)
    assert sum(work) == sum(m.cost.refresh for m in plan.matrices)
    figures = figures_of(plan)
    assert figures.refresh_max == max(work)
    assert figures.refresh_max_over_mean == max(work) * len(work) / sum(work)


def test_one_rank_sends_nothing_and_needs_no_buffers():
    figures = figures_of(made(ranks=1))
    assert figures.sent_bytes_step_max == figures.messages_step_max == 0
    assert figures.buffer_bytes_max == figures.collectives_step == 0
    assert figures.step_efficiency == 1.0


def test_buffers_hold_a_round_that_arrives_one_at_work_and_one_that_leaves():
    plan = made(ranks=2, distribution="owner")
    (only,) = plan.rounds
    there, back = only.moves[0]
    want = 0
    for rank in range(2):
        arriving, leaving = (
            sum(c.nbytes for c in (*way.sent(rank), *way.received(rank)))
            for way in (there, back)
        )
        held = sum(4 * m.view.numel for m in plan.matrices if m.route.owner == rank)
        # A single round: it arrives, is worked on, and leaves with its results.
        want = max(want, arriving, held, leaving + held)
    assert figures_of(plan).buffer_bytes_max == want


def test_more_rounds_need_less_memory_than_one():
    one = made(ranks=2, distribution="owner")
    more = made(ranks=2, distribution="owner", buffer_bytes=1000)
    assert len(more.rounds) > 3 > len(one.rounds)
    assert figures_of(more).buffer_bytes_max < figures_of(one).buffer_bytes_max


def test_a_model_without_matrices_has_figures():
    figures = figures_of(made(options={"sides": "none"}))
    assert figures.rounds == 0 and figures.team_sizes == {}
    assert figures.step_efficiency == figures.work_max_over_mean == 1.0


def test_the_sample_has_the_first_the_last_and_the_most_loaded():
    work, state = [1] * 1000, [1] * 1000
    work[333], state[777], work[500] = 9, 9, 0
    assert {0, 333, 500, 777, 999} <= set(sample(work, state))
    assert len(sample(work, state)) < 40
    assert sample([3] * 32, [1] * 32) == list(range(32))


def test_numbers_have_three_digits_and_a_unit():
    assert size(0) == "0 B" and size(999.6) == "1 kB" and size(50331648) == "50.3 MB"
    assert number(12) == "12" and number(6.48e9) == "6.48 G"
