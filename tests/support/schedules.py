"""Runs of small models whose matrices are refreshed at different times."""

import copy

import torch
from torch.distributed.tensor import DTensor

from sharded_adadiag.testing.cases import Case, gradients
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
