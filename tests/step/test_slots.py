"""Bases in portions: the same run on every layout, and the reference's."""

import copy

import pytest
import torch
from support.schedules import (
    CASES,
    OPTIONS,
    STEPS,
    advance,
    alone,
    assert_one_process,
    assert_the_reference,
    continued,
    saved,
    start,
)
from support.stacks import advance as advance_stacks
from support.stacks import by_matrix, optimizer, placed
from support.stacks import weights as stack_weights
from support.training import CLASSES, whole_weights

from sharded_adadiag.plan.schedule import Slots
from sharded_adadiag.step.context import whose_turn
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_threads


def test_every_matrix_has_its_turn_once_in_a_period():
    slots = Slots.of(3, [2, 0, 1, 2])
    for every in (3, 7, 200):
        due = [whose_turn(slots, step, every) for step in range(2 * every)]
        first = {i: t for t, some in reversed([*enumerate(due)]) for i in some}
        assert first == {1: 0, 2: every // 3, 0: 2 * every // 3, 3: 2 * every // 3}
        assert due[:every] == due[every:]
        assert sum(map(len, due)) == 8
    assert whose_turn(Slots.one(4), 0, 5) == range(4)
    assert not whose_turn(Slots.one(4), 3, 5)
    assert not whose_turn(slots, 0, None)


@pytest.mark.parametrize("on_refresh", ["carry", "reproject"])
@pytest.mark.parametrize("method", CLASSES)
def test_slots_give_the_steps_of_the_reference(method, on_refresh):
    model, opt = start({"on_refresh": on_refresh}, method=method)
    options = {**OPTIONS, "on_refresh": on_refresh}
    slots = assert_the_reference(opt, model, options, method)
    assert {slots[name] for name in "abcde"} == {0, 1, 2}


@pytest.mark.parametrize(
    "layout,ranks,method,options",
    [
        ("fsdp2", 2, "AdaDiag", {}),
        ("fsdp2", 3, "AdafacDiag", {"basis": "eigh"}),
        ("hsdp", 4, "AdaDiag", {"on_refresh": "reproject"}),
        ("tp", 2, "HfacDiag", {}),
        ("ddp", 3, "AdaDiag", {"sides": "two", "nonfinite": "ignore"}),
    ],
)
def test_every_layout_has_the_slots_of_one_process(layout, ranks, method, options):
    assert_one_process(ranks, layout, options, method)


@pytest.mark.parametrize("layout", ["one process", "rows of 2", "dimension 1"])
def test_experts_and_blocks_of_rows_keep_to_slots_of_their_own(layout):
    slots = {"refresh_slots": 3}
    expected = by_matrix("AdaDiag", 8, **slots)
    at_once = by_matrix("AdaDiag", 8)

    def body(rank):
        model, own = placed(layout)
        opt = optimizer(model, "AdaDiag", distribution="owner", **own, **slots)
        advance_stacks(model, opt, 0, 8)
        return stack_weights(model)

    ranks = 1 if layout == "one process" else 2
    for found in run_threads(ranks, body):
        for name, value in expected.items():
            assert_equal(found[name], value, name)
    assert not torch.equal(expected["experts"], at_once["experts"])


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_a_resumed_run_has_the_slots_that_were_saved_whatever_it_was_made_with(stop):
    owner = {"distribution": "owner"}
    want = alone(owner)
    weights, state = run_threads(2, saved, "fsdp2", owner, stop)[0]
    other = {**owner, "refresh_slots": 1}
    for got, slots in run_threads(3, continued, "ddp", other, weights, state, stop):
        assert slots == 3
        for case, a, b in zip(CASES, got, want):
            assert_equal(a, b, case.name)


def test_a_number_taken_by_the_plan_is_kept_where_a_run_goes_on():
    auto = {"refresh_slots": "auto", "distribution": "owner"}
    model, opt = start(auto)
    assert opt.param_groups[0]["refresh_slots"] == "auto"
    advance(model, opt, range(1, 7))
    taken = opt.param_groups[0]["refresh_slots"]
    assert isinstance(taken, int) and taken > 1
    assert opt.state_dict()["param_groups"][0]["refresh_slots"] == taken
    weights, state = whole_weights(model, CASES), copy.deepcopy(opt.state_dict())
    advance(model, opt, range(7, STEPS + 1))
    want = whole_weights(model, CASES)
    for got, slots in run_threads(3, continued, "fsdp2", auto, weights, state, 6):
        assert slots == taken
        for case, a, b in zip(CASES, got, want):
            assert_equal(a, b, case.name)


def test_a_new_period_moves_the_slots_with_it():
    """As if the period had been that from the beginning, the count of steps too."""
    model, opt = start({"refresh_every": 9})
    assert_the_reference(opt, model, OPTIONS, period=lambda t: 9 if t < 5 else 4)
