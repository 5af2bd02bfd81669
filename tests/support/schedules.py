"""Runs of small models whose matrices are refreshed at different times."""

import copy

import torch
from torch.distributed.tensor import DTensor

from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import Case, gradients
from sharded_adadiag.testing.ranks import run_threads
from sharded_adadiag.testing.reference import ReferenceOptimizer
from support.training import (
    CLASSES,
    Parameters,
    groups,
    local_gradient,
    plain_names,
    sharded_model,
    whole_weights,
)

F32, F64 = torch.float32, torch.float64
CASES = (
    Case("a", (6, 8)),
    Case("b", (8, 6)),
    Case("c", (6, 6)),
    Case("d", (6, 6)),
    Case("e", (12, 5)),
    Case("vector", (5,)),
)
# Slots of 0, 1 and 3 steps after that of slot 0.
OPTIONS = {"lr": 1e-2, "refresh_every": 5, "refresh_slots": 3}
STEPS = 14
# No gradient: of `a` when its basis is due, of `d` at the beginning.
MISSING = {"a": (6, 7), "d": (1, 2, 3)}
ZERO = {"b": (1, 2, 9)}


def start(options, layout=None, dtype=F64, method="AdaDiag"):
    model, extra = Parameters(CASES, dtype), {}
    if layout is not None:
        model, extra = sharded_model(layout, CASES, dtype)
    opt = CLASSES[method](groups(model, CASES), **{**OPTIONS, **options, **extra})
    return model, opt


def given(step, dtype=F64):
    """The gradients of one step, counted from 1; None where there is none."""
    return [
        None
        if step in MISSING.get(case.name, ())
        else grad * (step not in ZERO.get(case.name, ()))
        for case, grad in zip(CASES, gradients(CASES, step, dtype))
    ]


def advance(model, opt, steps, dtype=F64):
    named = plain_names(model)
    for step in steps:
        for case, grad in zip(CASES, given(step, dtype)):
            param = named[case.name]
            local = None if grad is None else local_gradient(param, grad)
            # FSDP1 gives an empty piece no gradient.
            there = isinstance(local, DTensor) or (local is not None and local.numel())
            param.grad = local if there else None
        opt.step()


def alone(options, dtype=F64, method="AdaDiag"):
    model, opt = start(options, None, dtype, method)
    advance(model, opt, range(1, STEPS + 1), dtype)
    return whole_weights(model, CASES)


def trained(rank, layout, options, dtype, method):
    model, opt = start(options, layout, dtype, method)
    advance(model, opt, range(1, STEPS + 1), dtype)
    return whole_weights(model, CASES)


def assert_the_reference(opt, model, options, method="AdaDiag", period=None):
    """Take all steps beside the reference, with the period that a step has."""
    named = dict(model.named_parameters())
    theirs = {case.name: named[case.name].detach().clone() for case in CASES}
    reference = ReferenceOptimizer(method.lower(), theirs.values(), **options)
    for step in range(1, STEPS + 1):
        for group in (*opt.param_groups, *reference.param_groups) if period else ():
            group["refresh_every"] = period(step)
        for case, grad in zip(CASES, given(step)):
            named[case.name].grad = theirs[case.name].grad = grad
        opt.step()
        reference.step()
        for case in CASES:
            mine = named[case.name].detach()
            torch.testing.assert_close(mine, theirs[case.name], rtol=0, atol=1e-10)
    return {case.name: reference.slots[theirs[case.name]] for case in CASES}


def assert_one_process(ranks, layout, options, method):
    """Every distribution gives one process's run: owners in every bit."""
    for distribution, dtype in (("owner", F32), ("auto", F64), ("broadcast", F64)):
        chosen = {**options, "distribution": distribution}
        want = alone(chosen, dtype, method)
        for got in run_threads(ranks, trained, layout, chosen, dtype, method):
            for case, a, b in zip(CASES, got, want):
                if distribution == "owner":
                    assert_equal(a, b, case.name)
                else:
                    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def saved(rank, layout, options, stop):
    model, opt = start(options, layout)
    advance(model, opt, range(1, stop + 1))
    state = opt.state_dict()
    state["state"] = {
        i: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }
    return whole_weights(model, CASES), state


def continued(rank, layout, options, weights, state, stop):
    model, opt = start(options, layout)
    with torch.no_grad():
        for param, weight in zip(model.parameters(), weights):
            param.copy_(local_gradient(param, weight))
    opt.load_state_dict(copy.deepcopy(state))
    advance(model, opt, range(stop + 1, STEPS + 1))
    return whole_weights(model, CASES), opt.param_groups[0].get("refresh_slots")
