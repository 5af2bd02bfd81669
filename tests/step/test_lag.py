"""Bases that are in force some steps after their gradient, computed meanwhile."""

import copy
import time

import pytest
import torch
from support.schedules import (
    CASES,
    F32,
    F64,
    OPTIONS,
    STEPS,
    advance,
    alone,
    assert_one_process,
    assert_the_reference,
    continued,
    given,
    saved,
    start,
    trained,
)
from support.stacks import advance as advance_stacks
from support.stacks import by_matrix, optimizer, placed
from support.stacks import weights as stack_weights
from support.teams import teams_of
from support.training import CLASSES, local_gradient, whole_weights

from sharded_adadiag.step import refresh
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import gradients
from sharded_adadiag.testing.ranks import run_processes, run_threads

LAG = {"refresh_lag": 2}


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("on_refresh", ["carry", "reproject"])
@pytest.mark.parametrize("method", CLASSES)
def test_a_lag_gives_the_steps_of_the_reference(method, on_refresh, slots):
    """With gradients that are zero or missing when a basis is begun or due."""
    for lag in (1, 2, 4):
        own = {"on_refresh": on_refresh, "refresh_slots": slots, "refresh_lag": lag}
        model, opt = start(own, method=method)
        assert_the_reference(opt, model, {**OPTIONS, **own}, method)


def test_a_lag_changes_the_run_from_the_first_late_basis_on():
    found = []
    for lag in (0, 2):
        model, opt = start({"refresh_slots": 1, "refresh_lag": lag})
        weights = []
        for step in range(1, 9):
            advance(model, opt, [step])
            weights.append(whole_weights(model, CASES)[2])
        found.append(weights)
    same = [torch.equal(a, b) for a, b in zip(*found)]
    assert same == [True] * 5 + [False] * 3


@pytest.mark.parametrize(
    "layout,ranks,method,options",
    [
        ("fsdp2", 2, "AdaDiag", {}),
        ("fsdp2", 3, "AdafacDiag", {"basis": "eigh"}),
        ("hsdp", 4, "AdaDiag", {"on_refresh": "reproject"}),
        ("tp", 2, "HfacDiag", {"basis": "eigh"}),
        ("ddp", 3, "AdaDiag", {"sides": "two", "nonfinite": "ignore"}),
    ],
)
def test_every_layout_has_the_lag_of_one_process(layout, ranks, method, options):
    assert_one_process(ranks, layout, {**LAG, **options}, method)


@pytest.mark.parametrize("basis", ["svd", "eigh"])
def test_teams_have_the_lag_of_one_process(basis):
    options = {**LAG, "basis": basis}
    want = alone(options)
    with teams_of(2):
        found = run_threads(3, trained, "fsdp2", options, F64, "AdaDiag")
    for got in found:
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.multiprocess
def test_flat_ranges_of_fsdp1_have_the_lag_of_one_process():
    options = {**LAG, "distribution": "owner"}
    want = alone(options, F32)
    for got in run_processes(2, trained, "fsdp1", options, F32, "AdaDiag"):
        for case, a, b in zip(CASES, got, want):
            assert_equal(a, b, case.name)


@pytest.mark.parametrize("layout", ["one process", "rows of 2", "dimension 1"])
def test_experts_and_blocks_of_rows_are_late_one_by_one(layout):
    late = {"refresh_slots": 2, "refresh_lag": 1}
    expected = by_matrix("AdaDiag", 9, **late)
    in_time = by_matrix("AdaDiag", 9, refresh_slots=2)

    def body(rank):
        model, own = placed(layout)
        opt = optimizer(model, "AdaDiag", distribution="owner", **own, **late)
        advance_stacks(model, opt, 0, 9)
        return stack_weights(model)

    for found in run_threads(1 if layout == "one process" else 2, body):
        for name, value in expected.items():
            assert_equal(found[name], value, name)
    assert not torch.equal(expected["experts"], in_time["experts"])


def test_how_long_a_basis_takes_changes_nothing(monkeypatch):
    want = alone(LAG)
    quick = refresh.basis_of

    def slow(*args, **kwargs):
        time.sleep(0.02)
        return quick(*args, **kwargs)

    monkeypatch.setattr(refresh, "basis_of", slow)
    for a, b in zip(alone(LAG), want):
        assert_equal(a, b)


@pytest.mark.parametrize("first", ["owner", "broadcast"])
@pytest.mark.parametrize("stop", range(5, 10))
def test_a_run_goes_on_elsewhere_while_bases_are_on_their_way(stop, first):
    """T is 5, L is 2: bases are begun at steps 2, 4, 6, 7 and 9, and due 2 later."""
    want = alone({**LAG, "distribution": first})
    options = {**LAG, "distribution": first}
    weights, state = run_threads(2, saved, "fsdp2", options, stop)[0]
    states = state["state"].values()
    keys = [{k for k in values if k.startswith("next")} for values in states]
    assert keys == [
        {"next_rotation_left"},
        {"next_rotation_right"},
        {"next_rotation_left"},
        {"next_rotation_left"},
        {"next_rotation_right"},
        set(),
    ]
    assert any(bool(v[key].any()) for v, some in zip(states, keys) for key in some)
    other = {"distribution": "owner", "refresh_slots": 1}
    for got, _ in run_threads(3, continued, "ddp", other, weights, state, stop):
        for case, a, b in zip(CASES, got, want):
            if first == "owner":
                assert_equal(a, b, case.name)
            else:
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_saving_disturbs_nothing_and_a_copy_goes_on_alike():
    model, opt = start(LAG)
    copies = []
    for step in range(1, STEPS + 1):
        advance(model, opt, [step])
        if 6 <= step <= 9:
            opt.state_dict()
            copies.append(copy.deepcopy((model, opt)))
    want = alone(LAG)
    for a, b in zip(whole_weights(model, CASES), want):
        assert_equal(a, b)
    for done, (twin, its) in enumerate(copies, start=6):
        advance(twin, its, range(done + 1, STEPS + 1))
        for a, b in zip(whole_weights(twin, CASES), want):
            assert_equal(a, b)


def test_without_a_lag_nothing_is_kept_for_one():
    _, state = saved(0, None, {}, 6)
    assert not any(k.startswith("next") for s in state["state"].values() for k in s)
    assert "refresh_lag" not in state["param_groups"][0]


def test_a_state_of_before_the_lag_is_taken_up_without_a_word(recwarn):
    weights, state = saved(0, None, {}, 6)
    got, _ = continued(0, None, LAG, weights, state, 6)
    assert not [w for w in recwarn if "loaded state" in str(w.message)]
    assert all(bool(torch.isfinite(w).all()) for w in got)


def test_a_skipped_step_does_not_count():
    """Neither for a basis that is begun in it nor for one that is due."""

    def body(skipped):
        model, opt = start({**LAG, "nonfinite": "skip"})
        named = dict(model.named_parameters())
        for step in range(1, STEPS + 1):
            if step in skipped:
                for case, grad in zip(CASES, gradients(CASES, step, F64)):
                    named[case.name].grad = grad * float("nan")
                opt.step()
            advance(model, opt, [step])
        assert opt.skipped_steps == len(skipped)
        return whole_weights(model, CASES)

    for a, b in zip(body({6, 7, 8}), body(())):
        assert_equal(a, b)


class BrokenError(RuntimeError):
    pass


def breaking(monkeypatch):
    """Decompositions of 12 x 5 matrices fail once they are made beside training."""
    basis_of = refresh.basis_of
    broken = {"on": False}

    def fails(made, **how):
        if broken["on"] and tuple(made["gradient"].shape) == (12, 5):
            raise BrokenError("out of memory, say")
        return basis_of(made, **how)

    monkeypatch.setattr(refresh, "basis_of", fails)
    return broken


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_a_failure_is_an_error_on_every_rank_at_the_step_it_is_due(
    monkeypatch, distribution, nonfinite
):
    broken = breaking(monkeypatch)
    options = {**LAG, "refresh_slots": 1, "nonfinite": nonfinite}

    def body(rank):
        model, opt = start({**options, "distribution": distribution}, "fsdp2")
        advance(model, opt, range(1, 6))
        broken["on"] = True
        advance(model, opt, (6, 7))  # begun at step 6, due at step 8
        before = whole_weights(model, CASES)
        with pytest.raises(RuntimeError, match="e: a new basis of it is due") as at_8:
            advance(model, opt, [8])
        with pytest.raises(RuntimeError, match="not saved") as at_save:
            opt.state_dict()
        for a, b in zip(whole_weights(model, CASES), before):
            assert_equal(a, b)
        return str(at_8.value), str(at_save.value), type(at_8.value.__cause__)

    found = run_threads(3, body)
    assert len({(step, save) for step, save, _ in found}) == 1
    assert [cause for *_, cause in found].count(BrokenError) == 1


def test_a_failure_in_one_process_is_raised_when_it_is_due(monkeypatch):
    broken = breaking(monkeypatch)
    model, opt = start({**LAG, "refresh_slots": 1})
    advance(model, opt, range(1, 6))
    broken["on"] = True
    advance(model, opt, (6, 7))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="e: a new basis of it is due"):
            advance(model, opt, [8])


def test_a_parameter_without_a_gradient_gets_its_basis_in_its_next_step():
    """A step without it counts for nobody: neither t nor what is due goes on."""

    def body(pauses):
        model, opt = start({**LAG, "refresh_slots": 1})
        named = dict(model.named_parameters())
        for step in range(1, 13):
            for case, grad in zip(CASES, gradients(CASES, step, F64)):
                named[case.name].grad = grad
            if step == 8 and pauses:  # its basis of step 6 is due
                for _ in range(3):
                    named["c"].grad = None
                    opt.step()
                named["c"].grad = gradients(CASES, step, F64)[2]
            opt.step()
        return whole_weights(model, CASES)[2]

    assert_equal(body(pauses=True), body(pauses=False))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_worker_computes_with_as_many_threads_as_the_step(threads):
    """Bits of a decomposition depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = []
        model, opt = start({**LAG, "refresh_slots": 1})
        advance(model, opt, range(1, 6))
        engine = opt._binding._engine
        begin = engine.pending.begin

        def looking(matrix, position, due, gathered, compute):
            def look(tensor):
                seen.append(torch.get_num_threads())
                return compute(tensor)

            begin(matrix, position, due, gathered, look)

        engine.pending.begin = looking
        advance(model, opt, range(6, 9))
        assert len(seen) > 2 and set(seen) == {threads}
    finally:
        torch.set_num_threads(before)


def test_a_long_gradient_may_be_overwritten_while_its_basis_is_computed():
    model, opt = start({**LAG, "refresh_slots": 1})
    named = dict(model.named_parameters())
    twin, its = start({**LAG, "refresh_slots": 1})
    theirs = dict(twin.named_parameters())
    for step in range(1, 12):
        for case, grad in zip(CASES, given(step)):
            if grad is None:
                named[case.name].grad = theirs[case.name].grad = None
                continue
            named[case.name].grad = local_gradient(named[case.name], grad.clone())
            theirs[case.name].grad = grad.clone()
        opt.step()
        its.step()
        for p in named.values():  # as the next backward pass does
            if p.grad is not None:
                p.grad.fill_(float("nan"))
    for a, b in zip(whole_weights(model, CASES), whole_weights(twin, CASES)):
        assert_equal(a, b)
