"""Gradients that break optimizers: huge, tiny, deficient, repeated, not finite."""

import dataclasses
import math
from itertools import count

import pytest
import torch
from support.pairs import parametrize_pairs
from support.random_cases import CLASSES, HARD, Parameter, RandomCase, gradient
from support.random_checks import check, other_bits
from support.small_model import snapshot
from support.training import Parameters, groups, local_gradient, sharded_model, whole
from torch.distributed.tensor import DTensor

from sharded_adadiag.testing import reference as reference_module
from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal
from sharded_adadiag.testing.cases import Case, gradients
from sharded_adadiag.testing.ranks import run_threads
from sharded_adadiag.testing.reference import ReferenceOptimizer

LR, STEPS, PERIOD = 1e-2, 6, 2
REPEATED = ("rank one", "rank three", "orthogonal")
SHAPES = ((6, 6), (6, 9), (9, 6), (4, 2, 3, 1), (7,))
# By Cauchy and Schwarz |Mhat| / sqrt(Vhat) is at most 1.03 in the first six steps with
# Adam's betas; Adafactor clips to an RMS of 1, to which H-Fac adds two means.
LARGEST_RMS = {"AdaDiag": 1.03, "AdafacDiag": 1.0, "HfacDiag": 4.0}


def hard_case(method, kind, dtype, scale, **options):
    params = tuple(Parameter(s, True, "", (kind,) * STEPS) for s in SHAPES)
    options = {"refresh_every": PERIOD, "distribution": "owner", **options}
    return RandomCase(method, "fsdp2", (3,), params, dtype, scale, options)


def hard_cases(**more):
    sides, basis = ("one", "two"), ("svd", "eigh")
    return parametrize_pairs(method=CLASSES, sides=sides, basis=basis, **more)


def steps_of_one_process(case):
    """The updates of each step over lr, and the states after the last."""
    params = [torch.zeros(p.shape, dtype=case.dtype) for p in case.params]
    opt = CLASSES[case.method](params, lr=LR, **case.options)
    updates = []
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = gradient(case, i, step)
        before = [param.clone() for param in params]
        opt.step()
        updates.append([(p - b).double() / LR for p, b in zip(params, before)])
    return updates, [opt.state[param] for param in params]


def check_sane(case, largest):
    updates, states = steps_of_one_process(case)
    for step, of_step in enumerate(updates):
        for i, update in enumerate(of_step):
            rms = float(update.square().mean().sqrt())
            # The weights themselves round to their dtype.
            assert rms <= largest * (1 + 16 * torch.finfo(case.dtype).eps), (step, i)
    for state in states:
        for key, value in state.items():
            assert not bool(value.isnan().any()), key
            if key.startswith("rotation"):
                assert_orthogonal(value, 30 * torch.finfo(value.dtype).eps, key)


@hard_cases(kind=("full", *HARD), dtype=(torch.float32, torch.bfloat16))
def test_updates_are_finite_and_of_the_size_of_lr(method, sides, basis, kind, dtype):
    case = hard_case(method, kind, dtype, 1.0, sides=sides, basis=basis)
    check_sane(case, LARGEST_RMS[method])


@hard_cases(kind=("full", "rank one"), scale=(1e-40, 1e-30, 1e-12, 1e12, 1e20, 1e30))
def test_no_scale_of_float32_breaks_a_step(method, sides, basis, kind, scale):
    """1e-40 is denormal; from 2e19 on squares overflow, and what has them stands."""
    case = hard_case(method, kind, torch.float32, scale, sides=sides, basis=basis)
    check_sane(case, LARGEST_RMS[method])


LARGE = tuple(Case(str(i), s) for i, s in enumerate(s for s in SHAPES if len(s) > 1))


def largest_steps(rank, layout, method, options):
    """The greatest numbers of float32 three times, then ordinary ones."""
    model, extra = Parameters(LARGE, torch.float32), {}
    if layout:
        model, extra = sharded_model(layout, LARGE, torch.float32)
    opt = CLASSES[method](
        groups(model, LARGE), lr=LR, refresh_every=PERIOD, **options, **extra
    )
    for step, scale in enumerate((torch.inf, torch.inf, torch.inf, 1.0, 1.0)):
        for param, grad in zip(
            model.parameters(), gradients(LARGE, step, torch.float32)
        ):
            limit = torch.finfo(grad.dtype).max
            param.grad = local_gradient(param, (scale * grad).clamp(-limit, limit))
        opt.step()
    for state in opt.state.values():
        for key, value in state.items():
            assert not bool(value.isnan().any()), key
    return [whole(param).detach().clone() for param in model.parameters()]


@parametrize_pairs(
    method=CLASSES,
    sides=("one", "two"),
    basis=("svd", "eigh"),
    on_refresh=("carry", "reproject"),
    nonfinite=("raise", "ignore"),
)
def test_the_largest_finite_gradients_leave_finite_weights(
    method, sides, basis, on_refresh, nonfinite
):
    """Their squares are infinite, which stops a matrix, as it does under Adam."""
    options = {"sides": sides, "basis": basis}
    options |= {"on_refresh": on_refresh, "nonfinite": nonfinite}
    before = [param.detach() for param in Parameters(LARGE, torch.float32).parameters()]
    for a, b in zip(largest_steps(0, "", method, options), before):
        assert bool(a.isfinite().all())
        assert float((a - b).abs().max()) < 1.0


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize("layout,world_size", [("fsdp2", 3), ("tp", 2), ("ddp", 2)])
@pytest.mark.parametrize("method", CLASSES)
def test_the_largest_finite_gradients_leave_finite_weights_on_every_rank(
    method, layout, world_size, distribution
):
    options = {"sides": "two", "distribution": distribution}
    for weights in run_threads(world_size, largest_steps, layout, method, options):
        assert all(bool(weight.isfinite().all()) for weight in weights)


@parametrize_pairs(
    method=CLASSES,
    scale=(1e-40, 1e-30, 1.0, 1e30),
    dtype=(torch.float32, torch.bfloat16),
    basis=("svd", "eigh"),
)
def test_three_ranks_give_the_bits_of_one_process(method, scale, dtype, basis):
    """Each shape goes through every kind, and each step has several kinds."""
    case = hard_case(method, "", dtype, scale, sides="two", basis=basis)
    params = tuple(
        dataclasses.replace(param, grads=HARD[i:] + HARD[:i])
        for i, param in enumerate(case.params)
    )
    check(dataclasses.replace(case, params=params), other_bits)


def checked_basis(grad, state):
    """Our rotations, after they were found to be singular vectors of the gradient."""
    found = {key: value for key, value in state.items() if key.startswith("rotation")}
    for key, value in found.items():
        assert_orthogonal(value, 1e-14, key)
    p, q = found.get("rotation_left"), found.get("rotation_right")
    rotated = grad if p is None else p.mT @ grad
    rotated = rotated if q is None else rotated @ q
    values = torch.linalg.svdvals(grad)
    if p is not None and q is not None:
        want, got = torch.zeros_like(rotated), rotated
        want.diagonal().copy_(values)
    else:
        got = rotated.mT @ rotated if p is None else rotated @ rotated.mT
        want = torch.diag(values.square())
        want = torch.nn.functional.pad(want, 2 * (0, got.shape[0] - want.shape[0]))
    atol = 1e-14 * float(want.max())
    torch.testing.assert_close(got, want, rtol=0.0, atol=atol)
    return {key: value.clone() for key, value in found.items()}


@hard_cases(kind=("full", *HARD))
def test_the_steps_are_those_of_the_reference(method, sides, basis, kind, monkeypatch):
    """In float64, with gradients so small that eps drowns what is only round-off.

    Where singular values are equal any basis of theirs is as good as another, so the
    reference takes ours after that has been held against what makes it one. The
    rotated entries that should be zero differ, by 1e-16 |G|. Adam divides
    them by eps, 1e-8. The factored accumulators' 1e-30 become k 1e-30 in a direction
    without gradient, and Vhat becomes k^2 1e-60 / |G|^2 where two of them meet. Both
    quotients are at most 1e-10, which lr makes 1e-12.
    """
    scale = 1e-3 if method == "AdaDiag" else 1e-12
    case = hard_case(method, kind, torch.float64, scale, sides=sides, basis=basis)
    options = {k: v for k, v in case.options.items() if k != "distribution"}
    ours = [torch.zeros(p.shape, dtype=case.dtype) for p in case.params]
    theirs = [weight.clone() for weight in ours]
    opt = CLASSES[method](ours, lr=LR, **options)
    reference = ReferenceOptimizer(method.lower(), theirs, lr=LR, **options)
    states = (opt.state[weight] for _ in count() for weight in ours if weight.dim() > 1)
    if kind in REPEATED:

        def ours_checked(grad, *_):
            return checked_basis(grad, next(states))

        monkeypatch.setattr(reference_module, "_basis", ours_checked)
    for step in range(STEPS):
        for i, pair in enumerate(zip(ours, theirs)):
            # Of one order in memory, which decides how products round.
            grad = gradient(case, i, step).contiguous()
            for weight in pair:
                weight.grad = grad.clone()
        opt.step()
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


MODEL = (Case("a", (8, 6)), Case("b", (6, 8)), Case("c", (5,)), Case("d", (4, 2, 2, 1)))
POISONED, REAL_STEPS = 2, 5


def poisoned_run(rank, layout, method, options, poison, name):
    """Only the last rank's own part of one gradient has a bad entry, on one step."""
    model, extra = sharded_model(layout, MODEL, torch.float32)
    opt = CLASSES[method](
        groups(model, MODEL), lr=LR, refresh_every=PERIOD, **options, **extra
    )
    named, message, unchanged = dict(model.named_parameters()), "", True
    last = rank == torch.distributed.get_world_size() - 1
    for step in range(REAL_STEPS):
        for case, full in zip(MODEL, gradients(MODEL, step, torch.float32)):
            grad = named[case.name].grad = local_gradient(named[case.name], full)
            mine = grad.to_local() if isinstance(grad, DTensor) else grad
            if step == POISONED and last and case.name == name and mine.numel():
                mine.view(-1)[0] = poison
        before = snapshot(model, opt)
        try:
            opt.step()
        except RuntimeError as error:
            assert step == POISONED
            message = str(error)
        if step == POISONED:
            after = snapshot(model, opt)
            unchanged = all(torch.equal(a, b) for a, b in zip(after, before))
    weights = [whole(param).detach().clone() for param in model.parameters()]
    return message, unchanged, opt.skipped_steps, weights


def clean_run(method, options):
    """The same steps without the poisoned one, on one process."""
    model = Parameters(MODEL, torch.float32)
    opt = CLASSES[method](groups(model, MODEL), lr=LR, refresh_every=PERIOD, **options)
    for step in range(REAL_STEPS):
        grads = gradients(MODEL, step, torch.float32)
        for param, grad in zip(model.parameters(), grads):
            param.grad = grad
        if step != POISONED:
            opt.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize(
    "layout,world_size,method",
    [
        *(("fsdp2", 2, method) for method in CLASSES),
        ("hsdp", 4, "AdafacDiag"),
        ("tp", 2, "HfacDiag"),
        ("fsdp2+tp", 4, "AdaDiag"),
        ("ddp", 3, "AdafacDiag"),
    ],
)
def test_a_refused_step_leaves_no_trace_on_any_rank(
    layout, world_size, method, nonfinite
):
    """Weights, moments, rotations, counters of steps: all as if it had not been."""
    for name, poison, distribution in (
        ("a", math.nan, "owner"),
        ("c", math.inf, "owner"),
        ("d", -math.inf, "broadcast"),
    ):
        options = {"nonfinite": nonfinite, "distribution": distribution}
        arguments = layout, method, options, poison, name
        want = clean_run(method, options)
        for ran in run_threads(world_size, poisoned_run, *arguments):
            message, unchanged, skipped, weights = ran
            assert unchanged
            assert skipped == (nonfinite == "skip")
            assert (f"{name}: its gradient has NaN" in message) == (not skipped)
            if distribution == "owner":
                for a, b in zip(weights, want):
                    assert_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*did not converge; the old basis was kept")
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("layout,world_size", [("fsdp2", 2), ("ddp", 3)])
def test_an_ignored_entry_spoils_its_own_parameter_only(layout, world_size, method):
    options = {"nonfinite": "ignore", "distribution": "owner"}
    for ran in run_threads(
        world_size, poisoned_run, layout, method, options, math.nan, "a"
    ):
        finite = [bool(weight.isfinite().all()) for weight in ran[3]]
        assert ran[0] == ""
        assert finite[1:] == [True, True, True]
        assert layout == "ddp" or not finite[0]


def transposed(tensor):
    """The same entries, in the other order in memory."""
    return tensor.mT.contiguous().mT


@parametrize_pairs(
    method=CLASSES,
    basis=("svd", "eigh"),
    rotate=(False, True),
    weights_too=(False, True),
)
def test_the_order_in_memory_does_not_matter(method, basis, rotate, weights_too):
    """Shapes that fill torch's CPU kernel exactly, and others."""
    shapes = [(8, 8), (2, 10), (10, 12), (4, 2, 4, 4)]
    runs = []
    for order in (torch.Tensor.contiguous, transposed):
        kept = order if weights_too else torch.Tensor.contiguous
        params = [kept(torch.ones(s, dtype=torch.float64)) for s in shapes]
        group = {"params": params, "rotate": rotate}
        opt = CLASSES[method]([group], lr=LR, basis=basis, refresh_every=PERIOD)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            for param in params:
                grad = torch.randn(param.shape, generator=generator).to(param)
                param.grad = order(grad)
            opt.step()
        runs.append(params)
    for a, b in zip(*runs):
        assert_equal(a, b)
