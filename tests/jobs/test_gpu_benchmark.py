"""The command for a GPU runs to its end on a CPU, with sizes for a trial."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

sys.path[:0] = [str(ROOT / "examples" / "benchmarks")]

import gpu  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "examples" / "benchmarks" / "gpu.py")]
FIGURES = {
    "decompositions": {"ms", "orthogonality"},
    "steps": {"step_ms", "longest_ms", "state_bytes"},
    "training": {"step_ms", "optimizer_ms", "share", "longest_ms"},
}
OURS = {"AdaDiag", "AdaDiag, eigh", "AdaDiag++", "AdaDiag++, eigh"}
OURS |= {"AdafacDiag", "HfacDiag"}


def measured(folder: Path, *flags: str) -> dict[str, Any]:
    asked = ["--device", "cpu", "--tiny", "--out", str(folder), *flags]
    subprocess.run([*COMMAND, *asked], check=True, timeout=600)
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.multiprocess
def test_the_command_for_a_gpu_measures_everything(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert found["device"] == "cpu" and "torch" in found["machine"]
    for part, figures in FIGURES.items():
        assert found[part]
        for row in found[part]:
            if row["note"] is not None:
                assert row["note"] == "not installed"
                continue
            assert all(row[key] > 0 and math.isfinite(row[key]) for key in figures)
            assert row.get("peak_bytes") is None  # the CPU does not tell it
    assert all(row["orthogonality"] < 1e-5 for row in found["decompositions"])
    ran = {row["optimizer"] for row in found["steps"] if row["note"] is None}
    assert ran >= OURS | {"torch AdamW, fused", "torch Muon"}
    assert {row["optimizer"] for row in found["training"]} == {
        "torch AdamW, fused",
        "AdaDiag",
    }
    assert all(0 < row["share"] < 1 for row in found["training"])
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith(found["machine"])
    assert page.count("\n| ") == sum(1 + len(found[part]) for part in FIGURES)


@pytest.mark.multiprocess
def test_a_part_of_it_can_be_asked_for(tmp_path: Path) -> None:
    found = measured(tmp_path, "--parts", "decompositions")
    assert found["decompositions"] and "steps" not in found


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("of 80 GiB"), "does not fit in memory"),
        (torch.linalg.LinAlgError("at 1376"), "did not converge"),
        (ModuleNotFoundError("no", name="transformers"), "transformers is not"),
    ],
)
def test_what_cannot_be_measured_is_a_row_that_says_why(
    error: Exception, note: str
) -> None:
    def measure() -> dict[str, float]:
        raise error

    (row,) = gpu.rows_of("training", [({"model": "tiny"}, measure)])
    assert row["model"] == "tiny" and row["note"].startswith(note)
    assert all(row[key] is None for key in gpu.FIGURES["training"])
