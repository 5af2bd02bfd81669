"""Stacks and fused projections move as their matrices would, one parameter each."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from support.counting import Counted
from support.pairs import parametrize_pairs
from support.stacks import (
    LAYOUTS,
    SHAPES,
    advance,
    by_matrix,
    optimizer,
    placed,
    weights,
)

from sharded_adadiag import named_state_dict
from sharded_adadiag.plan import stacks
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes, run_threads

STEPS = 8
METHODS = ("AdaDiag", "AdafacDiag", "HfacDiag")
EXTRA = {
    "plain": {},
    "reprojected": {"basis": "eigh", "on_refresh": "reproject"},
    "noise floor": {"noise_floor": 0.05, "maximize": True},
    "other dtype": {"state_dtype": torch.bfloat16, "side": "right"},
}
IN_THREADS = [name for name in LAYOUTS if name != "fsdp1"]


def trained(rank, layout, method, options, steps=STEPS):
    model, own = placed(layout)
    opt = optimizer(model, method, **own, **options)
    advance(model, opt, 0, steps)
    return weights(model)


def on_ranks(layout, body, *args):
    ranks = LAYOUTS[layout][0]
    if ranks == 1:
        return [body(0, layout, *args)]
    return run_threads(ranks, body, layout, *args)


@parametrize_pairs(
    layout=IN_THREADS,
    method=METHODS,
    sides=("none", "one", "two"),
    extra=tuple(EXTRA),
)
def test_every_layout_gives_the_bits_of_one_parameter_for_each_matrix(
    layout, method, sides, extra
):
    options = {"sides": sides, **EXTRA[extra]}
    expected = by_matrix(method, STEPS, **options)
    owner = {**options, "distribution": "owner"}
    for found in on_ranks(layout, trained, method, owner):
        for name in SHAPES:
            assert_equal(found[name], expected[name], name)


def cut_apart(rank, layout, options):
    model, own = placed(layout)
    opt = optimizer(model, "AdaDiag", **own, **options)
    advance(model, opt, 0, STEPS)
    rounds = opt._binding._engine.plan.rounds
    cut = {p.matrix.view.name for r in rounds for p in r.parts if not p.whole}
    return weights(model), cut


@pytest.mark.parametrize("extra", ["plain", "reprojected", "other dtype"])
@pytest.mark.parametrize("layout", [n for n in IN_THREADS if LAYOUTS[n][0] > 1])
def test_lone_matrices_over_the_budget_travel_in_blocks(layout, extra, monkeypatch):
    """Products of fewer lines may round differently, by a bit."""
    monkeypatch.setattr(stacks, "RUN_NUMEL", 1)
    options = {"sides": "one", "buffer_bytes": 600, **EXTRA[extra]}
    expected = by_matrix("AdaDiag", STEPS, **options)
    options["distribution"] = "owner"
    for found, cut in on_ranks(layout, cut_apart, options):
        for name in SHAPES:
            close = {"atol": 1e-6, "rtol": 0.0}
            torch.testing.assert_close(found[name], expected[name], **close)
        assert cut >= {"fused[0]"}
        at_home = layout.startswith("rows of")  # but where fewer ranks would work
        assert at_home or cut >= {f"experts[{i}]" for i in range(5)}


@pytest.mark.parametrize("method", METHODS)
def test_flat_ranges_of_fsdp1_give_the_same_bits(method):
    expected = by_matrix(method, STEPS)
    options = {"distribution": "owner"}
    for found in run_processes(3, trained, "fsdp1", method, options):
        for name in SHAPES:
            assert_equal(found[name], expected[name], name)


@pytest.mark.parametrize("distribution", ["auto", "broadcast"])
@pytest.mark.parametrize("layout", ["rows of 2", "hsdp", "ddp"])
def test_other_distributions_leave_stacks_with_owners(layout, distribution):
    expected = by_matrix("AdaDiag", STEPS)
    for found in on_ranks(layout, trained, "AdaDiag", {"distribution": distribution}):
        for name in ("experts", "down"):
            assert_equal(found[name], expected[name], name)
        torch.testing.assert_close(found["fused"], expected["fused"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["one process", "rows of 2", "dimension 1"])
def test_an_expert_without_tokens_for_forty_steps_moves_as_under_adam(layout):
    """The first has no basis until then; the moments of the second only decay."""
    idle = {1: range(40), 2: range(2, 42)}
    expected = by_matrix("AdaDiag", 44, idle)

    def body(rank, layout):
        model, own = placed(layout)
        opt = optimizer(model, "AdaDiag", distribution="owner", **own)
        rotations = []
        for start, stop in ((0, 40), (40, 44)):
            advance(model, opt, start, stop, idle)
            saved = named_state_dict(opt, full_state_dict=True)["state"]
            rotations.append(saved["experts"]["rotation_left"].clone())
        return weights(model), *rotations

    for found, early, late in on_ranks(layout, body):
        is_identity = [torch.equal(one, torch.eye(6)) for one in early]
        assert is_identity == [False, True, False, False, False]
        assert not torch.equal(late[1], torch.eye(6))
        for name in SHAPES:
            assert_equal(found[name], expected[name], name)


@pytest.mark.parametrize("layout", ["rows of 2", "rows of 3"])
def test_sharded_over_the_experts_a_step_exchanges_nothing(layout, monkeypatch):
    ready = []

    def body(rank, layout):
        model, own = placed(layout)
        opt = optimizer(model, "AdafacDiag", **own)
        del opt.param_groups[1:]
        advance(model, opt, 0, 1)
        dist.barrier()
        ready.append(rank)
        counted = Counted()
        with counted.watching(monkeypatch) if rank == 1 else contextlib.nullcontext():
            dist.barrier()
            advance(model, opt, 3, 4)  # all bases are refreshed
            dist.barrier()
        return counted.calls, opt.describe()

    results = on_ranks(layout, body)
    assert results[1][0] == 1  # the agreement
    report = results[0][1]
    assert report.collectives_per_step == 1 and report.refresh_collectives == 0


def test_experts_are_listed_by_owner():
    def body(rank, layout):
        model, own = placed(layout)
        return optimizer(model, "AdaDiag", **own).describe()

    report = on_ranks("rows of 2", body)[0]
    names = {m.name: (m.rows, m.cols, m.owner) for m in report.matrices}
    assert names["experts[0..2]"] == (6, 9, 0) and names["experts[3..4]"] == (6, 9, 1)
    assert names["fused[1]"][:2] == (3, 8)
