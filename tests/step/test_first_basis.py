"""A gradient of zeros makes no basis: the first one that is not zero does."""

import copy

import pytest
import torch
from support.training import (
    CLASSES,
    Parameters,
    groups,
    local_gradient,
    sharded_model,
    whole_weights,
)
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_adadiag import AdaDiag
from sharded_adadiag.algorithm.update import lacks_basis
from sharded_adadiag.step import bases
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import Case, gradients
from sharded_adadiag.testing.ranks import run_threads
from sharded_adadiag.testing.reference import ReferenceOptimizer

F64 = torch.float64
# The steps, counted from 1, on which a case's gradient is zero. With T = 3 bases are
# due on steps 1, 4, 7 and 10: `late` gets its first one on step 3, between them, and
# `pausing` keeps its first one on step 4.
ZERO = {"late": (1, 2), "late_tall": (1, 2, 3, 4, 5), "pausing": (4,), "usual": ()}
CASES = (
    Case("late", (6, 6)),
    Case("late_tall", (12, 6)),
    Case("pausing", (6, 6)),
    Case("usual", (8, 6)),
    Case("vector", (5,)),
)
STEPS, PERIOD = 8, 3


def late_gradients(step, dtype):
    """Those of one step, counted from 1."""
    return [
        grad * (step not in ZERO.get(case.name, ()))
        for case, grad in zip(CASES, gradients(CASES, step, dtype))
    ]


def advance(model, opt, steps, dtype=F64):
    named = dict(model.named_parameters())
    for step in steps:
        for case, grad in zip(CASES, late_gradients(step, dtype)):
            named[case.name].grad = local_gradient(named[case.name], grad)
        opt.step()


def start(method, options, layout=None, dtype=F64):
    if layout is None:
        model, extra = Parameters(CASES, dtype), {}
    else:
        model, extra = sharded_model(layout, CASES, dtype)
    opt = CLASSES[method](
        groups(model, CASES),
        **{"lr": 1e-2, "refresh_every": PERIOD, **options, **extra},
    )
    return model, opt


def alone(method, options, dtype=F64):
    model, opt = start(method, options, dtype=dtype)
    advance(model, opt, range(1, STEPS + 1), dtype)
    return whole_weights(model, CASES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refresh_every": None},
        {"on_refresh": "reproject"},
        {"sides": "two", "on_refresh": "reproject"},
        {"basis": "eigh", "side": "right"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", CLASSES)
def test_zeros_make_no_basis_and_the_first_other_gradient_does(method, options):
    cases = CASES
    if "sides" in options:  # a longer side's null space has no basis of its own
        cases = tuple(c for c in CASES if c.shape == (6, 6))
    model, opt = start(method, options)
    named = {c.name: p for c, p in zip(CASES, model.parameters())}
    theirs = {name: p.detach().clone() for name, p in named.items()}
    reference = ReferenceOptimizer(
        method.lower(),
        theirs.values(),
        **{"lr": 1e-2, "refresh_every": PERIOD, **options},
    )
    rotations = []
    for step in range(1, STEPS + 1):
        for case, grad in zip(CASES, late_gradients(step, F64)):
            named[case.name].grad = theirs[case.name].grad = grad
        opt.step()
        reference.step()
        for case in cases:
            a, b = named[case.name], theirs[case.name]
            torch.testing.assert_close(a.detach(), b, rtol=0.0, atol=1e-10)
        state = {name: opt.state[p] for name, p in named.items()}
        assert lacks_basis(state["late"]) == (step < 3)
        assert lacks_basis(state["late_tall"]) == (step < 6)
        assert not lacks_basis(state["pausing"])
        kept = {k: v for k, v in state["pausing"].items() if k.startswith("rotation")}
        rotations.append(copy.deepcopy(kept))
    for key, value in rotations[2].items():
        assert_equal(rotations[3][key], value, "kept on step 4, when a basis was due")


def weights_on_ranks(rank, layout, method, options, dtype):
    model, opt = start(method, options, layout, dtype)
    advance(model, opt, range(1, STEPS + 1), dtype)
    return whole_weights(model, CASES)


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize(
    "layout,world_size,method,options",
    [
        ("fsdp2", 3, "AdaDiag", {}),
        ("fsdp2", 2, "AdaDiag", {"refresh_every": None, "basis": "eigh"}),
        ("fsdp2", 2, "AdaDiag", {"on_refresh": "reproject"}),
        ("hsdp", 4, "AdafacDiag", {}),
        ("tp", 2, "HfacDiag", {"basis": "eigh"}),
        ("fsdp2+tp", 4, "AdaDiag", {"sides": "two"}),
        ("ddp", 2, "AdaDiag", {"on_refresh": "reproject", "refresh_every": None}),
    ],
)
def test_every_rank_learns_at_once_that_there_is_a_basis(
    layout, world_size, method, options, nonfinite
):
    for distribution, dtype in (("owner", torch.float32), ("broadcast", F64)):
        given = {**options, "nonfinite": nonfinite, "distribution": distribution}
        want = alone(method, given, dtype)
        for got in run_threads(
            world_size, weights_on_ranks, layout, method, given, dtype
        ):
            for case, a, b in zip(CASES, got, want):
                if distribution == "owner":
                    assert_equal(a, b, case.name)
                elif "sides" not in options or len(set(case.shape)) == 1:
                    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def saved(rank, layout, distribution):
    """Weights and states after two steps: `late` has no basis yet."""
    model, opt = start("AdaDiag", {"distribution": distribution}, layout)
    advance(model, opt, (1, 2))
    state = opt.state_dict()
    state["state"] = {
        i: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }
    return whole_weights(model, CASES), state


def continued(rank, layout, distribution, weights, state):
    model, opt = start("AdaDiag", {"distribution": distribution}, layout)
    with torch.no_grad():
        for param, weight in zip(model.parameters(), weights):
            param.copy_(local_gradient(param, weight))
    opt.load_state_dict(copy.deepcopy(state))
    advance(model, opt, range(3, STEPS + 1))
    return whole_weights(model, CASES)


@pytest.mark.parametrize(
    "first,then",
    [
        (("fsdp2", "owner"), ("fsdp2", "broadcast")),
        (("ddp", "broadcast"), ("fsdp2", "owner")),
        (("fsdp2", "broadcast"), ("ddp", "owner")),
    ],
)
def test_a_checkpoint_of_before_the_first_basis_goes_on_elsewhere(first, then):
    want = alone("AdaDiag", {})
    weights, state = run_threads(3, saved, *first)[0]
    assert not lacks_basis(state["state"][2])
    assert lacks_basis(state["state"][0])
    for got in run_threads(2, continued, *then, weights, state):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_an_ordinary_step_does_not_look_for_a_basis(monkeypatch):
    """Not even the one after the first; after a load each matrix is looked at once."""
    looked = []

    def counting(state):
        looked.append(state)
        return lacks_basis(state)

    monkeypatch.setattr(bases, "lacks_basis", counting)
    model, opt = start("AdaDiag", {"refresh_every": 100})
    for step in range(1, 6):
        grads = gradients(CASES, step, F64)
        for param, grad in zip(model.parameters(), grads):
            param.grad = grad
        opt.step()
    assert looked == []
    opt.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step()
    assert len(looked) == len(CASES) - 1


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, whose B starts at zero."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frozen = torch.randn(12, 8, generator=generator, dtype=F64)
        self.weight = nn.Parameter(frozen, requires_grad=False)
        self.a = nn.Parameter(torch.randn(4, 8, generator=generator, dtype=F64))
        self.b = nn.Parameter(torch.zeros(12, 4, dtype=F64))

    def forward(self, x):
        return x @ (self.weight + self.b @ self.a).mT


def test_both_factors_of_a_low_rank_adapter_are_rotated():
    """A has no gradient but zeros until the first step has moved B."""
    model = Adapted()
    opt = AdaDiag([model.a, model.b], lr=1e-2, refresh_every=None)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(32, k, generator=generator, dtype=F64) for k in (8, 12))
    for step in range(3):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        assert lacks_basis(opt.state[model.a]) == (step == 0)
        assert not lacks_basis(opt.state[model.b])
