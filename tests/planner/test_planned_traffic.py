"""Planned bytes and messages are those of an optimizer on a real group."""

import pytest
import torch
import torch.distributed as dist
from support.decoders import EVEN_MODEL, TINY_MODEL, groups, set_gradients, shared

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.plan.report import report_of
from sharded_adadiag.plan.sums import sums_of
from sharded_adadiag.planner.figures import figures_of, traffic
from sharded_adadiag.planner.mesh import Mesh
from sharded_adadiag.planner.request import Request, answer
from sharded_adadiag.testing.ranks import run_processes, run_threads

CLASSES = {"AdaDiag": AdaDiag, "AdafacDiag": AdafacDiag, "HfacDiag": HfacDiag}


class Counting:
    """Stands for the collectives of torch and counts what a rank hands to them."""

    def __init__(self):
        self.bytes = self.messages = self.collectives = 0
        self.all_to_all, self.all_reduce = dist.all_to_all_single, dist.all_reduce

    def __enter__(self):
        dist.all_to_all_single, dist.all_reduce = self.exchange, self.reduce
        return self

    def __exit__(self, *_):
        dist.all_to_all_single, dist.all_reduce = self.all_to_all, self.all_reduce

    def exchange(self, target, source, received, sent, **more):
        assert sent[dist.get_rank()] == 0
        self.bytes += source.nbytes
        self.messages += sum(size > 0 for size in sent)
        self.collectives += 1
        return self.all_to_all(target, source, received, sent, **more)

    def reduce(self, tensor, *args, **more):
        self.bytes += tensor.nbytes
        self.collectives += 1
        return self.all_reduce(tensor, *args, **more)


def counted(rank, model, mesh, name, distribution, options):
    """What a rank sends in an ordinary step, and what its optimizer promised."""
    module, extra = shared(model, mesh)
    if mesh.layout == "ddp":
        options = {**options, **extra}
    optimizer = CLASSES[name](
        groups(module, model), distribution=distribution, **options
    )
    for step in range(2):
        set_gradients(module, step)
        optimizer.step()
    set_gradients(module, 2)
    with Counting() as seen:
        optimizer.step()
    report = optimizer.describe()
    return (seen.bytes, seen.messages, seen.collectives), report


CASES = [
    (Mesh(2), "AdaDiag", "auto", {}),
    (Mesh(4), "AdaDiag", "auto", {}),
    (Mesh(4), "AdaDiag", "owner", {"sides": "two"}),
    (Mesh(4), "AdaDiag", "broadcast", {"sides": "two", "noise_floor": 1e-3}),
    (Mesh(4, replicas=2), "AdafacDiag", "broadcast", {"momentum": False}),
    (Mesh(4, tensor_parallel=2), "HfacDiag", "auto", {}),
    (Mesh(2, "fsdp1"), "AdaDiag", "auto", {"state_dtype": torch.bfloat16}),
    (Mesh(2, "ddp"), "HfacDiag", "broadcast", {"nonfinite": "ignore"}),
    (Mesh(2), "AdafacDiag", "auto", {"max_rotated_dim": 12}),
]


@pytest.mark.multiprocess
@pytest.mark.parametrize("mesh,name,distribution,options", CASES, ids=str)
def test_bytes_messages_and_collectives_are_those_of_a_real_group(
    mesh, name, distribution, options
):
    model = EVEN_MODEL if mesh.tensor_parallel > 1 else TINY_MODEL
    rule = CLASSES[name].rule
    ran = run_processes(mesh.ranks, counted, model, mesh, name, distribution, options)
    plan = answer(Request(model, mesh, rule, options, distribution)).plan
    sums = sums_of(plan)
    figures = figures_of(plan, sums)
    report = report_of(plan, sums)
    for rank, ((sent, messages, collectives), described) in enumerate(ran):
        assert described == report
        planned = traffic(plan, rank)
        assert planned.messages == messages
        assert report.ranks[rank].bytes_per_step == sent
        assert figures.collectives_step == collectives
    assert figures.sent_bytes_step_max == max(seen[0] for seen, _ in ran)
    assert figures.messages_step_max == max(seen[1] for seen, _ in ran)
    states = [row.state_bytes for row in report.ranks]
    assert figures.state_bytes_max == max(states)
    assert figures.state_bytes_mean == sum(states) / len(states)


def described(rank, mesh, name, options):
    module, extra = shared(TINY_MODEL, mesh)
    return CLASSES[name](groups(module, TINY_MODEL), **options, **extra).describe()


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("distribution", ["owner", "broadcast", "auto"])
def test_sums_over_blocks_are_those_that_an_optimizer_describes(name, distribution):
    mesh = Mesh(3)
    options = {"noise_floor": 1e-3, "distribution": distribution}
    (want, *_) = run_threads(3, described, mesh, name, options)
    rule = CLASSES[name].rule
    asked = Request(TINY_MODEL, mesh, rule, {"noise_floor": 1e-3}, distribution)
    plan = answer(asked).plan
    assert report_of(plan, sums_of(plan)) == want
