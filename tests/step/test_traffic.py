"""What ranks send and keep: as `describe` promises, and shared evenly."""

import pytest
import torch
import torch.distributed as dist
from support.counting import Counted
from support.pairs import parametrize_pairs
from support.small_model import NAMED, fresh, set_gradients
from support.training import groups, sharded_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, param_groups
from sharded_adadiag.testing.cases import (
    HARD_CASES,
    Case,
)
from sharded_adadiag.testing.ranks import run_threads


@parametrize_pairs(
    layout=["fsdp2", "ddp"],
    distribution=["owner", "broadcast", "auto"],
    sides=["one", "two"],
    method=[AdaDiag, AdafacDiag, HfacDiag],
)
def test_collectives_and_bytes_are_those_that_describe_promises(
    layout, distribution, sides, method, monkeypatch
):
    options = {"sides": sides, "distribution": distribution}
    ordinary = promised_and_made(layout, method, options, monkeypatch)
    if method is AdaDiag and distribution == "owner":
        assert ordinary[0] == (3 if layout == "fsdp2" else 2)


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize("method", [AdaDiag, AdafacDiag])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_a_noise_floor_costs_the_collective_that_describe_promises(
    layout, method, nonfinite, monkeypatch
):
    """A broadcast step needs the norm of the whole gradient for it."""
    options = {"distribution": "broadcast", "nonfinite": nonfinite}
    none = promised_and_made(layout, method, options, monkeypatch)
    options["noise_floor"] = 1e-3
    some = promised_and_made(layout, method, options, monkeypatch)
    assert some[0] == none[0] + 1


def promised_and_made(layout, method, options, monkeypatch):
    """Steps 2 and 3 are ordinary, step 4 refreshes every basis (T = 3)."""
    seen = {}
    cases = tuple(c for c in HARD_CASES if not c.without_gradient)

    def body(rank):
        model, extra = sharded_model(layout, cases, torch.float32)
        opt = method(groups(model, cases), refresh_every=3, **options, **extra)
        for step in range(4):
            dist.barrier()
            set_gradients(model, cases, step, torch.float32)
            before = (counted.calls, counted.bytes)
            dist.barrier()
            opt.step()
            if rank == 1:
                after = (counted.calls, counted.bytes)
                seen[step] = tuple(b - a for a, b in zip(before, after))
        return opt.describe()

    counted = Counted()
    with counted.watching(monkeypatch):
        report = run_threads(3, body)[1]
    ordinary = report.collectives_per_step, report.ranks[1].bytes_per_step
    assert seen[1] == seen[2] == ordinary
    assert seen[3] == (
        ordinary[0] + report.refresh_collectives,
        ordinary[1] + report.ranks[1].refresh_bytes,
    )
    return ordinary


def test_an_owner_sends_and_receives_two_models_over_the_ranks():
    """2 x numel / world elements per rank and step, however many ranks."""
    cases = tuple(Case(f"w{i}", (24, 24)) for i in range(8))
    numel = 8 * 24 * 24
    for world_size in (2, 4, 8):
        reports = run_threads(world_size, described, cases, {"distribution": "owner"})
        sent = [row.bytes_per_step for row in reports[0].ranks]
        away = 2 * 4 * numel * (world_size - 1) / world_size**2
        headers = 2 * 8 * (world_size - 1) + 4 * (len(cases) + 5)
        assert max(sent) == min(sent) == away + headers


def described(rank, cases, options):
    model, _ = sharded_model("fsdp2", cases, torch.float32)
    opt = AdaDiag(groups(model, cases), **options)
    return opt.describe()


@pytest.mark.parametrize("distribution", ["owner", "auto"])
def test_states_are_sharded_on_the_60m_shapes(distribution):
    """Meta tensors of LLaMA 60M on 4 ranks: the real states, without the memory."""
    per_rank = run_threads(4, bytes_of_60m, distribution)
    whole = run_threads(1, bytes_of_60m, distribution)[0]
    mean = sum(per_rank) / 4
    assert max(per_rank) <= 1.15 * mean
    if distribution == "owner":
        assert sum(per_rank) == pytest.approx(whole, rel=0.02)


def bytes_of_60m(rank, distribution):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(32000, 512))
        for _ in range(8):
            shapes = [(512, 512)] * 4 + [(512, 1376)] * 2 + [(1376, 512)]
            linears = [nn.Linear(a, b, bias=False) for a, b in shapes]
            model.append(fully_shard(nn.Sequential(*linears), mesh=mesh))
        model.append(nn.Linear(512, 32000, bias=False))
    fully_shard(model, mesh=mesh)
    return AdaDiag(param_groups(model), distribution=distribution).state_bytes()


def test_a_basis_is_computed_on_exactly_one_rank(monkeypatch):
    """Counts decompositions over 4 ranks and 2 refreshes in each distribution."""
    from sharded_adadiag.algorithm import statistic

    calls = []
    real = statistic.compute_basis

    def counting(grad, **options):
        calls.append(tuple(grad.shape))
        return real(grad, **options)

    monkeypatch.setattr(statistic, "compute_basis", counting)
    for distribution in ("owner", "broadcast"):
        calls.clear()
        run_threads(4, four_steps, distribution)
        assert sorted(calls) == sorted([(8, 6), (6, 8)] * 2)


def four_steps(rank, distribution):
    model, opt = fresh(distribution=distribution, refresh_every=3)
    for step in range(4):
        set_gradients(model, NAMED, step, torch.float32)
        opt.step()
