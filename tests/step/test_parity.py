"""Given the same gradients, every layout gives the weights of one process."""

import pytest
import torch
from support.pairs import parametrize_pairs
from support.training import Parameters, alone, sharded_model, train, weights_of
from torch import Tensor

from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.cases import (
    HARD_CASES,
    Case,
)
from sharded_adadiag.testing.ranks import run_processes, run_threads

LAYOUTS = (
    [("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)]
    + [("fsdp2", n) for n in (1, 2, 3, 4, 8)]
    + [("ddp", 2), ("ddp", 4)]
)


@parametrize_pairs(
    place=LAYOUTS, dtype=(torch.float32, torch.float64), sides=("one", "two")
)
def test_owner_distribution_gives_the_same_bits(place, dtype, sides):
    layout, world_size = place
    options = {"sides": sides, "distribution": "owner"}
    want = alone(HARD_CASES, dtype, "AdaDiag", options)
    got = run_threads(
        world_size, weights_of, layout, HARD_CASES, dtype, "AdaDiag", options
    )
    for rank in range(world_size):
        for case, a, b in zip(HARD_CASES, got[rank], want):
            assert_equal(a, b, case.name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_flat_pieces_of_fsdp1_give_the_same_bits(world_size, sides):
    options = {"sides": sides}
    cases = tuple(c for c in HARD_CASES if not c.frozen)
    want = alone(cases, torch.float32, "AdaDiag", options)
    got = run_processes(
        world_size, weights_of, "fsdp1", cases, torch.float32, "AdaDiag", options
    )
    for rank in range(world_size):
        for case, a, b in zip(cases, got[rank], want):
            assert_equal(a, b, case.name)


@parametrize_pairs(place=LAYOUTS, sides=("one", "two"), basis=("svd", "eigh"))
def test_broadcast_distribution_agrees_to_1e_6(place, sides, basis):
    layout, world_size = place
    options = {"sides": sides, "basis": basis, "distribution": "broadcast"}
    want = alone(HARD_CASES, torch.float64, "AdaDiag", options)
    got = run_threads(
        world_size, weights_of, layout, HARD_CASES, torch.float64, "AdaDiag", options
    )
    for rank in range(world_size):
        for case, a, b in zip(HARD_CASES, got[rank], want):
            torch.testing.assert_close(
                a, b, atol=1e-6, rtol=1e-6, msg=lambda m, c=case: f"{c.name}: {m}"
            )


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_bfloat16_parameters_get_the_same_bits(state_dtype):
    options = {"distribution": "owner", "state_dtype": state_dtype}
    want = alone(HARD_CASES, torch.bfloat16, "AdaDiag", options)
    got = run_threads(
        3, weights_of, "fsdp2", HARD_CASES, torch.bfloat16, "AdaDiag", options
    )
    for case, a, b in zip(HARD_CASES, got[2], want):
        assert_equal(a, b, case.name)


def few_steps(rank: int, layout: str, cases: tuple[Case, ...]) -> list[Tensor]:
    model, extra = sharded_model(layout, cases, torch.float32)
    options = {"distribution": "owner", **extra}
    return train(model, cases, torch.float32, "AdaDiag", options, steps=3)[0]


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_64_ranks_give_the_same_bits(layout):
    """Far more ranks than matrices, and most shards empty."""
    cases = tuple(c for c in HARD_CASES if not c.frozen)
    model = Parameters(cases, torch.float32)
    options = {"distribution": "owner"}
    want, _ = train(model, cases, torch.float32, "AdaDiag", options, steps=3)
    got = run_threads(64, few_steps, layout, cases)
    for rank in (0, 31, 63):
        for case, a, b in zip(cases, got[rank], want):
            assert_equal(a, b, case.name)
