"""Every option and method means on several ranks what it means on one process."""

import pytest
import torch
import torch.distributed as dist
from support.counting import Counted
from support.training import Parameters, alone, train, weights_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import (
    HARD_CASES,
    ONE_PARAMETER,
    Case,
)
from sharded_adadiag.testing.ranks import run_processes, run_threads

F64 = torch.float64


@pytest.mark.parametrize("method", ["AdafacDiag", "HfacDiag"])
@pytest.mark.parametrize("sides", ["none", "one", "two"])
@pytest.mark.parametrize("layout,world_size", [("fsdp2", 3), ("ddp", 2)])
def test_factored_methods_agree_in_both_distributions(
    layout, world_size, sides, method
):
    for distribution in ("owner", "broadcast"):
        options = {"sides": sides, "distribution": distribution}
        cases = HARD_CASES
        if sides == "two" and distribution == "broadcast":
            # A longer side has directions without any gradient. The accumulators'
            # 1e-30 does not tame their round-off, so only bits of one order agree.
            cases = tuple(c for c in cases if len(set(c.shape)) == 1)
        want = alone(cases, F64, method, options)
        got = run_threads(world_size, weights_of, layout, cases, F64, method, options)
        for rank in range(world_size):
            for case, a, b in zip(cases, got[rank], want):
                if distribution == "owner":
                    assert_equal(a, b, case.name)
                else:
                    torch.testing.assert_close(
                        a, b, atol=1e-6, rtol=1e-6, msg=lambda m, c=case: c.name + m
                    )


@pytest.mark.parametrize("distribution", ["owner", "broadcast"])
@pytest.mark.parametrize(
    "options",
    [
        {"on_refresh": "reproject", "sides": "one"},
        {"on_refresh": "reproject", "sides": "two"},
        {"noise_floor": 1e-3, "sides": "two"},
        {"side": "right"},
        {"basis": "eigh"},
        {"side": "left", "maximize": True},
        {"max_rotated_dim": 8},
        {"rotation_dtype": torch.float32, "state_dtype": torch.float32},
    ],
    ids=str,
)
def test_every_option_means_the_same_on_several_ranks(options, distribution):
    options = {**options, "distribution": distribution}
    want = alone(HARD_CASES, F64, "AdaDiag", options)
    got = run_threads(3, weights_of, "fsdp2", HARD_CASES, F64, "AdaDiag", options)
    # States kept in float32 round, and the blocks round elsewhere than the whole.
    bar = 1e-6 if "state_dtype" not in options else 2e-4
    for case, a, b in zip(HARD_CASES, got[0], want):
        if distribution == "owner":
            assert_equal(a, b, case.name)
        else:
            torch.testing.assert_close(
                a, b, atol=bar, rtol=bar, msg=lambda m, c=case: f"{c.name}: {m}"
            )


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_single_parameter_is_enough(world_size):
    options = {"distribution": "auto"}
    want = alone(ONE_PARAMETER, F64, "AdaDiag", options)
    got = run_threads(
        world_size, weights_of, "fsdp2", ONE_PARAMETER, F64, "AdaDiag", options
    )
    torch.testing.assert_close(got[0][0], want[0], atol=1e-6, rtol=1e-6)


def test_shards_by_columns_agree_and_need_no_communication_for_wide_matrices(
    monkeypatch,
):
    cases = (Case("wide", (6, 12)), Case("wider", (8, 16)))
    options = {"distribution": "broadcast", "basis": "eigh", "nonfinite": "ignore"}
    want = alone(cases, F64, "AdaDiag", options)
    counted = Counted()
    with counted.watching(monkeypatch):
        ran = run_threads(2, by_columns, cases, options)
    # Whether all gradients of step 1 are zero; Gram matrices and bases of 3 refreshes.
    assert counted.calls == 1 + 3 * 2
    for weights, report in ran:
        assert report.collectives_per_step == 0
        assert report.ranks[0].bytes_per_step == 0
        for a, b in zip(weights, want):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def by_columns(rank, cases, options):
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Parameters(cases, F64)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    weights, opt = train(model, cases, F64, "AdaDiag", options)
    return weights, opt.describe()


@pytest.mark.multiprocess
def test_owners_on_gloo_processes_give_the_same_bits():
    options = {"distribution": "owner", "sides": "two"}
    want = alone(HARD_CASES, torch.float32, "AdaDiag", options)
    got = run_processes(
        2, weights_of, "fsdp2", HARD_CASES, torch.float32, "AdaDiag", options
    )
    for case, a, b in zip(HARD_CASES, got[1], want):
        assert_equal(a, b, case.name)
