"""Bases made of the momentum and of Gram averages, on ranks and against SOAP."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from support.counting import Counted
from support.pairs import parametrize_pairs
from support.stacks import LAYOUTS, SHAPES, by_matrix, placed, weights
from support.stacks import advance as advance_stacks
from support.stacks import optimizer as of_stacks
from support.teams import teams_of
from support.training import (
    CLASSES,
    PERIOD,
    STEPS,
    Parameters,
    advance,
    alone,
    groups,
    sharded_model,
    train,
    weights_of,
    whole_weights,
)
from torch import nn

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import HARD_CASES, ONE_PARAMETER
from sharded_adadiag.testing.ranks import run_processes, run_threads
from sharded_adadiag.testing.reference import ReferenceOptimizer

F64 = torch.float64
PLACES = [("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 5), ("hsdp", 4), ("tp", 2), ("ddp", 4)]
ALL = 1 << 30
GRAM = {"basis_from": "gram", "gram_beta": 0.9}
MADE_OF = {
    "gram": GRAM,
    "gram, original": {**GRAM, "first_moment": "original"},
    "momentum": {"basis_from": "momentum", "first_moment": "original"},
    "gradient, original": {"first_moment": "original"},
}
METHODS = ("AdaDiag", "AdafacDiag", "HfacDiag")


def options_of(made_of, method, sides):
    """H-Fac has no momentum to make a basis of."""
    known = method == "HfacDiag" and made_of == "momentum"
    return {"sides": sides, **MADE_OF["gram" if known else made_of]}


def cases_of(sides):
    """On two sides those without directions in which there is no gradient.

    Which basis these get depends on the last bits of a sum, which several ranks add up
    in another order.
    """
    if sides == "one":
        return HARD_CASES
    return tuple(c for c in HARD_CASES if len(set(c.shape)) == 1)


def check_close(got, want, cases, tolerance=1e-6):
    for weights_there in got:
        for case, a, b in zip(cases, weights_there, want):
            torch.testing.assert_close(
                a,
                b,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, c=case: f"{c.name}: {m}",
            )


@parametrize_pairs(
    place=[*PLACES, ("fsdp2+tp", 4)],
    sides=("one", "two"),
    made_of=tuple(MADE_OF),
    method=METHODS,
)
def test_owners_give_the_bits_of_one_process(place, sides, made_of, method):
    layout, world_size = place
    options = {"distribution": "owner", **options_of(made_of, method, sides)}
    dtype = torch.float32
    want = alone(HARD_CASES, dtype, method, options)
    got = run_threads(
        world_size, weights_of, layout, HARD_CASES, dtype, method, options
    )
    for found in got:
        for case, a, b in zip(HARD_CASES, found, want):
            assert_equal(a, b, case.name)


@parametrize_pairs(
    place=PLACES,
    size=(2, 3, ALL),
    sides=("one", "two"),
    made_of=tuple(MADE_OF),
    method=METHODS,
)
def test_teams_agree_with_one_process(place, size, sides, made_of, method):
    layout, world_size = place
    cases, options = cases_of(sides), options_of(made_of, method, sides)
    want = alone(cases, F64, method, options)
    with teams_of(size):
        got = run_threads(world_size, weights_of, layout, cases, F64, method, options)
    check_close(got, want, cases)


@parametrize_pairs(
    place=PLACES,
    sides=("one", "two"),
    basis=("svd", "eigh"),
    made_of=tuple(MADE_OF),
    method=METHODS,
)
def test_all_ranks_agree_with_one_process(place, sides, basis, made_of, method):
    layout, world_size = place
    cases = cases_of(sides)
    options = {"basis": basis, **options_of(made_of, method, sides)}
    want = alone(cases, F64, method, options)
    options["distribution"] = "broadcast"
    got = run_threads(world_size, weights_of, layout, cases, F64, method, options)
    check_close(got, want, cases)


@parametrize_pairs(
    place=[("plain", 1), ("fsdp2", 3)],
    made_of=tuple(MADE_OF),
    method=METHODS,
    distribution=("owner", "broadcast"),
)
def test_with_a_lag_they_are_made_of_what_there_was_when_they_were_begun(
    place, made_of, method, distribution
):
    layout, world_size = place
    options = {"refresh_lag": 3, **options_of(made_of, method, "one")}
    model, reference = (Parameters(HARD_CASES, F64) for _ in range(2))
    oracle = ReferenceOptimizer(
        method.lower(),
        groups_of(reference),
        lr=1e-2,
        weight_decay=0.1,
        refresh_every=PERIOD,
        **options,
    )
    advance(reference, oracle, HARD_CASES, F64, 0, STEPS)
    want = whole_weights(reference, HARD_CASES)
    if world_size == 1:
        got = [train(model, HARD_CASES, F64, method, options)[0]]
    else:
        options["distribution"] = distribution
        got = run_threads(
            world_size, weights_of, layout, HARD_CASES, F64, method, options
        )
    check_close(got, want, HARD_CASES)


def groups_of(model):
    """As `support.training.groups`, without names and what is never trained."""
    return [
        {**group, "params": [p for _, p in group["params"] if p.requires_grad]}
        for group in groups(model, HARD_CASES)
    ]


@parametrize_pairs(
    place=[("fsdp2", 2), ("fsdp2", 3), ("ddp", 4)],
    buffer_bytes=(1, 600, 3000),
    size=(1, 2, ALL),
    made_of=tuple(MADE_OF),
)
def test_matrices_that_come_in_blocks_agree_with_one_process(
    place, buffer_bytes, size, made_of
):
    layout, world_size = place
    options = MADE_OF[made_of]
    want = alone(HARD_CASES, F64, "AdaDiag", options)
    options = {**options, "buffer_bytes": buffer_bytes}
    with teams_of(size):
        got = run_threads(
            world_size, weights_of, layout, HARD_CASES, F64, "AdaDiag", options
        )
    check_close(got, want, HARD_CASES)


@pytest.mark.multiprocess
@pytest.mark.parametrize("made_of", MADE_OF)
def test_flat_ranges_of_fsdp1_give_the_bits_of_one_process(made_of):
    cases = tuple(c for c in HARD_CASES if not c.frozen)
    options = {"distribution": "owner", **MADE_OF[made_of]}
    want = alone(cases, torch.float32, "AdaDiag", options)
    got = run_processes(
        2, weights_of, "fsdp1", cases, torch.float32, "AdaDiag", options
    )
    for found in got:
        for case, a, b in zip(cases, found, want):
            assert_equal(a, b, case.name)


@parametrize_pairs(
    layout=[name for name in LAYOUTS if name != "fsdp1"],
    made_of=tuple(MADE_OF),
    method=METHODS,
    sides=("one", "two"),
)
def test_stacks_and_blocks_of_rows_move_as_their_matrices_would(
    layout, made_of, method, sides
):
    options = options_of(made_of, method, sides)
    want = by_matrix(method, 8, **options)

    def body(rank, layout):
        model, own = placed(layout)
        opt = of_stacks(model, method, distribution="owner", **own, **options)
        advance_stacks(model, opt, 0, 8)
        return weights(model)

    ranks = LAYOUTS[layout][0]
    found = [body(0, layout)] if ranks == 1 else run_threads(ranks, body, layout)
    for some in found:
        for name in SHAPES:
            assert_equal(some[name], want[name], name)


def test_averages_cost_no_communication_between_refreshes(monkeypatch):
    """The short side of a wide matrix is whole where its columns are sharded."""
    counts = {}

    def body(rank, options):
        model, extra = sharded_model("tp", cases, torch.float32)
        _, opt = train(model, cases, torch.float32, "AdaDiag", {**options, **extra}, 2)
        dist.barrier()
        counted = Counted()
        watching = counted.watching(monkeypatch)
        with watching if rank == 1 else contextlib.nullcontext():
            dist.barrier()
            opt.step()
            dist.barrier()
        return counted.calls, opt.describe().collectives_per_step

    cases = (ONE_PARAMETER[0], type(ONE_PARAMETER[0])("wide", (6, 24)))
    for name, options in (("gradient", {"basis": "eigh"}), ("gram", GRAM)):
        options = {**options, "distribution": "broadcast"}
        counts[name] = run_threads(2, body, options)[1]
    assert counts["gram"] == counts["gradient"]


def test_a_skipped_step_leaves_the_averages_as_they_were():
    weight = nn.Parameter(torch.ones(4, 6))
    opt = AdaDiag(
        [{"params": [weight], "rotate": True}], nonfinite="skip", **MADE_OF["gram"]
    )
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    opt.step()
    before = opt.state[weight]["gram_left"].clone()
    weight.grad = torch.full((4, 6), torch.nan)
    opt.step()
    assert opt.skipped_steps == 1
    assert_equal(opt.state[weight]["gram_left"], before)


def test_averages_fade_under_zero_gradients_and_still_make_a_basis():
    weight = nn.Parameter(torch.ones(4, 6))
    groups = [{"params": [weight], "rotate": True}]
    opt = AdaDiag(groups, refresh_every=2, **MADE_OF["gram"])
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for given in (grad, torch.zeros(4, 6), torch.zeros(4, 6)):
        weight.grad = given.clone()
        opt.step()
    state = opt.state[weight]
    average = 0.9 * 0.9 * 0.1 * grad @ grad.mT
    torch.testing.assert_close(state["gram_left"], average, rtol=1e-5, atol=1e-6)
    p = state["rotation_left"]
    diagonal = p.mT @ average @ p
    assert (diagonal - diagonal.diag().diag()).abs().max() < 1e-5


def soap(weight, grads, period, *, lr, betas, eps, beta):
    """SOAP with a basis of all gradients up to this one, by eigh; written plainly.

    The first moment is kept in the original frame and rotated at each step.
    """
    m, n = weight.shape
    first, second = torch.zeros(m, n, dtype=F64), torch.zeros(m, n, dtype=F64)
    left, right = torch.zeros(m, m, dtype=F64), torch.zeros(n, n, dtype=F64)
    for t, g in enumerate(grads, start=1):
        left = beta * left + (1 - beta) * g @ g.mT
        right = beta * right + (1 - beta) * g.mT @ g
        if (t - 1) % period == 0:
            p = torch.linalg.eigh(left).eigenvectors.flip(1)
            q = torch.linalg.eigh(right).eigenvectors.flip(1)
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * (p.mT @ g @ q) ** 2
        corrected = p.mT @ first @ q / (1 - betas[0] ** t)
        direction = corrected / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        weight = weight - lr * p @ direction @ q.mT
    return weight


@pytest.mark.parametrize("period", [1, 3, 10])
def test_gram_averages_and_a_first_moment_in_the_original_frame_are_soap(period):
    generator = torch.Generator().manual_seed(3)
    # Small: what is round-off in the first step must be nothing beside eps.
    grads = 1e-3 * torch.randn(25, 6, 6, generator=generator, dtype=F64)
    start = torch.randn(6, 6, generator=generator, dtype=F64)
    how = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    want = soap(start, grads, period, beta=0.95, **how)
    weight = nn.Parameter(start.clone())
    opt = AdaDiag(
        [{"params": [weight], "rotate": True}],
        sides="two",
        basis_from="gram",
        first_moment="original",
        refresh_every=period,
        **how,
    )
    for grad in grads:
        weight.grad = grad.clone()
        opt.step()
    torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-10)


def test_a_rule_without_a_whole_first_moment_makes_no_basis_of_it():
    weight = nn.Parameter(torch.ones(4, 6))
    with pytest.raises(ValueError, match="HfacDiag keeps no whole first moment by its"):
        CLASSES["HfacDiag"]([weight], basis_from="momentum")
    with pytest.raises(ValueError, match="no whole first moment with momentum=False"):
        CLASSES["AdafacDiag"]([weight], momentum=False, basis_from="momentum")
    model = Parameters(ONE_PARAMETER, torch.float32)
    groups = [{"params": list(model.parameters()), "rotate": True}]
    opt = CLASSES["HfacDiag"](groups)
    with pytest.raises(ValueError, match="invalid basis_from"):
        opt.add_param_group({"params": [weight], "basis_from": "momentum"})
    assert len(opt.param_groups) == 1
