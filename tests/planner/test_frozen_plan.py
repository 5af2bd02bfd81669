"""The frozen plan: what it is made of, how it grows, who takes part."""

import dataclasses

import pytest
import torch
from support.specs import row_shards, spec

from sharded_adadiag.algorithm.state import ADADIAG, ADAFACDIAG
from sharded_adadiag.plan.plan import Plan

SHAPES = [(64, 64), (64, 160), (160, 64), (64,), (96, 32)]
RANKS = 4


def parts(names: str, ranks: int = RANKS):
    """Specs and layouts of parameters called a, b, ...; c is not rotated."""
    specs = [
        spec(n, *s, rotate=n != "c") for n, s in zip("abcde", SHAPES) if n in names
    ]
    return specs, [row_shards(*s.shape, ranks=ranks) for s in specs]


def plan_of(names: str, **options) -> Plan:
    return Plan.of(*parts(names), rule=ADADIAG, world_size=RANKS, **options)


def planned(plan: Plan) -> set[int]:
    return {part.matrix.index for some in plan.rounds for part in some.parts}


def test_equal_inputs_give_equal_plans_and_others_do_not():
    assert plan_of("abcde") == plan_of("abcde")
    assert plan_of("abcde") != plan_of("abcd")


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of("ab").world_size = 2


def test_it_says_which_parameters_are_matrices_and_which_stay_where_they_lie():
    plan = plan_of("abcde")
    assert [m.index for m in plan.matrices] == [0, 1, 4]
    assert plan.plain == (2, 3)
    assert planned(plan) == {0, 1, 4}


def test_what_was_planned_keeps_its_owner_and_round_when_parameters_join():
    first = plan_of("abc")
    both = first.extended(*parts("de"))
    assert both.matrices[: len(first.matrices)] == first.matrices
    assert both.rounds[: len(first.rounds)] == first.rounds
    assert [s.name for s in both.specs] == list("abcde")
    assert planned(both) == {0, 1, 4}
    owners = [m.route.owner for m in both.matrices]
    assert len(set(owners)) == len(owners)  # the new one goes to an idle rank


def test_parameters_that_leave_take_no_part_and_may_come_back():
    plan = plan_of("abcde")
    rest = plan.without({1, 2})
    assert [m.index for m in rest.members] == [0, 4] and planned(rest) == {0, 4}
    assert rest.plain == (3,)
    assert rest.matrices == plan.matrices
    assert rest.without(()) == plan


def test_rounds_stay_when_only_vectors_leave():
    plan = plan_of("abcde")
    assert plan.without({3}).rounds is plan.rounds


def test_a_parameter_whose_shards_are_of_another_number_of_ranks_is_a_mistake():
    with pytest.raises(AssertionError):
        Plan.of(*parts("ab", ranks=3), rule=ADADIAG, world_size=RANKS)


def test_the_head_of_a_step_is_free_alone_and_where_nothing_is_checked():
    plan = plan_of("abcde")
    assert plan.agreement_bytes == 4 * (5 + len(plan.watched) + 5)
    alone = Plan.of(*parts("ab", ranks=1), rule=ADADIAG, world_size=1)
    assert alone.agreement_bytes == 0
    specs, layouts = parts("ab")
    ignoring = [
        dataclasses.replace(s, options=dataclasses.replace(s.options, nonfinite=how))
        for s, how in zip(specs, ("ignore", "ignore"))
    ]
    ranks = {"rule": ADADIAG, "world_size": RANKS}
    quiet = Plan.of(ignoring, layouts, **ranks, distribution="owner")
    assert quiet.agreement_bytes == 0 and not quiet.watched
    # A team's refresh concerns ranks that must know of it.
    teams = Plan.of(ignoring, layouts, **ranks, distribution="auto")
    assert teams.agreement_bytes == 4 * (2 + 5 + len(teams.watched)) and teams.watched


@pytest.mark.parametrize(
    "options,want",
    [({}, 8), ({"state_dtype": torch.bfloat16}, 4), ({"momentum": False}, 4)],
)
def test_vectors_keep_as_many_bytes_as_their_rule_says(options, want):
    specs = [spec("v", 12, **options)]
    layouts = [row_shards(12, ranks=RANKS)]
    plan = Plan.of(specs, layouts, rule=ADAFACDIAG, world_size=RANKS)
    assert plan.plain_bytes(0) == want
