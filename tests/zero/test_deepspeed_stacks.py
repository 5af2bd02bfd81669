"""Stacks of matrices under DeepSpeed: flat ranges that cut them anywhere."""

import pytest
from support.zero_cells import Cell, followed
from support.zero_checkpoints import rigid

from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes

STACK = {
    "route": "client",
    "model": {"stack": True},
    "groups": ({"batch_dims": 1}, {}),
    "options": {"distribution": "owner"},
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stack_moves_as_in_one_process_at_every_stage(ranks):
    cells = [Cell(f"{stage}", stage, **STACK) for stage in (1, 2, 3)]
    cells.append(Cell("factored", 2, method="AdafacDiag", **STACK))
    for results in run_processes(ranks, followed, ranks, cells, timeout_s=240.0):
        for cell in cells:
            difference, moved, kinds = results[cell.name]
            assert difference == 0.0 and moved > 1e-3
            assert "stack" in kinds


@pytest.mark.multiprocess
def test_deepspeeds_own_checkpoint_has_the_states_of_a_stack(tmp_path):
    cells = [
        Cell("2", 2, **STACK),
        Cell("3 HfacDiag", 3, method="HfacDiag", **STACK),
    ]
    for results in run_processes(2, rigid, 2, cells, str(tmp_path), timeout_s=240.0):
        for cell in cells:
            whole, resumed = results[cell.name]
            for name, value in whole.items():
                assert_equal(resumed[name], value, f"{cell.name}: {name}")
