"""A report made of a plan alone says what an optimizer holds and sends."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from support.specs import row_shards, spec
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.algorithm.state import ADADIAG, ADAFACDIAG, HFACDIAG
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.report import report_of, state_bytes, step_work
from sharded_adadiag.testing.ranks import run_threads

SHAPES = {"a": (24, 24), "b": (24, 40), "v": (24,), "c": (40, 24), "d": (7, 24)}
RULES = {AdaDiag: ADADIAG, AdafacDiag: ADAFACDIAG, HfacDiag: HFACDIAG}


def reported(rank, ranks, cls, options):
    model = nn.ParameterDict({n: torch.zeros(s) for n, s in SHAPES.items()})
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    groups = [{"params": list(model.named_parameters()), "rotate": True}]
    optimizer = cls(groups, **options)
    return optimizer.describe(), optimizer.state_bytes()


def plan_of(ranks: int, cls, *, distribution="auto", **options) -> Plan:
    own = RULES[cls].options
    specs = [spec(n, *s, **own, **options) for n, s in SHAPES.items()]
    layouts = [row_shards(*s, ranks=ranks) for s in SHAPES.values()]
    return Plan.of(
        specs,
        layouts,
        rule=RULES[cls],
        world_size=ranks,
        distribution=distribution,
    )


@pytest.mark.parametrize("distribution", ["owner", "broadcast", "auto"])
@pytest.mark.parametrize("cls", [AdaDiag, AdafacDiag, HfacDiag])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_states_are_those_that_the_ranks_of_an_optimizer_hold(ranks, cls, distribution):
    options = {"distribution": distribution, "state_dtype": torch.bfloat16}
    ran = run_threads(ranks, reported, ranks, cls, options)
    plan = plan_of(ranks, cls, **options)
    held = [bytes_ for _, bytes_ in ran]
    assert state_bytes(plan) == held
    assert [row.state_bytes for row in ran[0][0].ranks] == held
    assert dataclasses.astuple(report_of(plan))[1] == dataclasses.astuple(ran[0][0])[1]


@pytest.mark.parametrize("distribution", ["owner", "broadcast", "auto"])
@pytest.mark.parametrize("sides", ["one", "two"])
def test_a_report_of_a_plan_is_that_of_an_optimizer(sides, distribution):
    options = {"distribution": distribution, "sides": sides, "basis": "eigh"}
    for ranks in (1, 2, 3):
        described = run_threads(ranks, reported, ranks, AdaDiag, options)[0][0]
        assert report_of(plan_of(ranks, AdaDiag, **options)) == described


def test_the_sums_of_a_rule_are_bytes_and_collectives_of_every_rank():
    plan = plan_of(2, HfacDiag, distribution="broadcast")
    none, some = report_of(plan), report_of(plan, [[80, 8], [4]])
    assert some.collectives_per_step == none.collectives_per_step + 3
    for a, b in zip(none.ranks, some.ranks):
        assert b.bytes_per_step == a.bytes_per_step + 92


def test_parameters_that_left_their_groups_count_no_longer():
    plan = plan_of(2, AdaDiag)
    rest = plan.without({0, 2})
    names = [row.name for row in report_of(rest).matrices]
    assert "a" not in names and len(names) == 3
    assert sum(state_bytes(rest)) < sum(state_bytes(plan))
    assert report_of(plan).plain - report_of(rest).plain == 1


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
def test_work_is_divided_and_not_lost(distribution):
    plan = plan_of(3, AdaDiag, distribution=distribution)
    whole = sum(m.cost.step for m in plan.matrices)
    assert sum(step_work(plan)) == pytest.approx(whole, rel=1e-3)
    assert [row.step_cost for row in report_of(plan).ranks] == step_work(plan)


@pytest.mark.parametrize("sides", ["one", "two"])
def test_a_report_says_what_is_over_the_budget(sides):
    plan = plan_of(2, AdaDiag, distribution="owner", sides=sides)
    small = dataclasses.replace(plan, buffer_bytes=12_100, rounds=()).without([0])
    report = report_of(small)
    assert (report.over_budget > 0) == (sides == "two")
    assert ("do not travel in blocks" in str(report)) == (sides == "two")


def test_no_process_group_is_needed():
    assert not dist.is_initialized()
    assert "rank" in str(report_of(plan_of(8, AdaDiag)))
