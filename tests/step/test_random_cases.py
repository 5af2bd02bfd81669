"""Random cases train alike on several ranks and on one process.

Five hundred by default, which takes about a minute on two cores. All ten
thousand: ``RANDOM_CASES=10000 python -m pytest -n 2 tests/step/test_random_cases.py``.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from support.random_cases import Parameter, RandomCase, any_case, tame_case
from support.random_checks import check, far_off, other_bits

# Parts of the cases, by layout; real FSDP2 is slower to set up.
SHARE = {
    "mesh": 5,
    "mesh of two dimensions": 5,
    "ddp": 4,
    "fsdp2": 3,
    "fsdp2 x tp": 3,
}

EXAMPLES = int(os.environ.get("RANDOM_CASES", "500"))

OWNED = 0.6  # the rest is computed in blocks


def examples(layout, fraction):
    return max(1, round(EXAMPLES * fraction * SHARE[layout] / sum(SHARE.values())))


@pytest.mark.filterwarnings("ignore:.*did not converge; the old basis was kept")
@pytest.mark.parametrize("layout", SHARE)
def test_owners_give_the_bits_of_one_process(layout):
    @settings(max_examples=examples(layout, OWNED))
    @given(any_case(layout))
    def run(case):
        check(case, other_bits)

    run()


@pytest.mark.parametrize("layout", SHARE)
def test_blocks_agree_with_one_process_where_the_method_is_not_chaotic(layout):
    @settings(max_examples=examples(layout, 1.0 - OWNED))
    @given(tame_case(layout))
    def run(case):
        check(case, far_off)

    run()


def column_cut_off(rows, **options):
    """A matrix of one column, sharded by columns: one of two ranks has nothing."""
    param = Parameter((rows, 1), True, "1", ("full",) * 3)
    options = {"distribution": "broadcast", "refresh_every": 2, **options}
    return RandomCase("AdafacDiag", "mesh", (2,), (param,), torch.float64, 1.0, options)


def gradient_in_another_order(method, **options):
    """QR gives orthogonal matrices column by column; on the way they become rows."""
    first = Parameter((1, 1), False, "", ("full", "full", "full", None))
    param = Parameter((2, 3), True, "", (None, None, "orthogonal", "full"))
    options = {"distribution": "owner", "basis": "eigh", "refresh_every": 2, **options}
    params = (first, param)
    return RandomCase(method, "fsdp2", (2,), params, torch.float64, 1.0, options)


@pytest.mark.parametrize(
    "case,differ",
    [
        (column_cut_off(1, sides="two"), far_off),
        (column_cut_off(9), far_off),
        (column_cut_off(9, basis="eigh"), far_off),
        (gradient_in_another_order("HfacDiag", sides="two"), other_bits),
    ],
    ids=["two sides", "one side", "gram", "order"],
)
def test_cases_that_once_failed(case, differ):
    check(case, differ)
