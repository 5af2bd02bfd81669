"""The memory of every optimizer is that of the paper's table, cell by cell."""

from __future__ import annotations

import runpy

import pytest
from support import ROOT

EXAMPLE = ROOT / "examples" / "benchmarks" / "table3.py"
TABLE3 = runpy.run_path(str(EXAMPLE))
SIZES, PRINTED, state_bytes = (TABLE3[k] for k in ("SIZES", "PRINTED", "state_bytes"))

CELLS = [
    (method, size, printed)
    for method, row in PRINTED.items()
    for size, printed in zip(SIZES, row, strict=True)
]


def elements(method: str, size: str) -> int:
    """What the formulas of the paper count, from the shapes alone."""
    llama = SIZES[size]
    h, f, layers = llama.hidden, llama.ffn, llama.layers
    matrices = layers * (4 * h * h + 3 * h * f)
    lines = layers * (4 * 2 * h + 3 * (h + f))  # a row and a column of each
    short = layers * 7 * h * h
    long = layers * (4 * h * h + 3 * f * f)
    table = 2 * TABLE3["VOCABULARY"] * h
    return {
        "Adam": 2 * matrices + 2 * table,
        "AdaDiag": 2 * matrices + 2 * table + short,
        "AdaDiag++": 2 * matrices + 2 * table + short + long,
        "Adafactor with momentum": matrices + lines + 2 * table,
        "Adafactor": lines + table,
        "AdafacDiag with momentum": matrices + lines + 2 * table + short,
        "AdafacDiag": lines + table + short,
        "Hfac": 2 * lines + 2 * table,
        "HfacDiag": 2 * lines + 2 * table + short,
    }[method]


def test_the_table_has_36_cells() -> None:
    assert len(CELLS) == 36


@pytest.mark.parametrize(("method", "size", "printed"), CELLS)
def test_a_cell_is_the_printed_one(method: str, size: str, printed: str) -> None:
    assert f"{state_bytes(method, size) / TABLE3['UNIT']:.2f}" == printed


@pytest.mark.parametrize(("method", "size", "printed"), CELLS)
def test_the_state_is_the_formula_and_a_step_counter_each(
    method: str, size: str, printed: str
) -> None:
    num_parameters = 7 * SIZES[size].layers + 2
    counters = state_bytes(method, size) - 2 * elements(method, size)
    assert counters == 4 * num_parameters
