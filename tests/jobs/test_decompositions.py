"""The benchmark of decompositions runs to its end and shows what float32 misses."""

import runpy
import sys

import torch
from support import ROOT

SCRIPT = ROOT / "examples" / "benchmarks" / "decompositions.py"


def test_it_writes_a_line_for_each_method_and_refresh(tmp_path, monkeypatch):
    out = tmp_path / "table.md"
    flags = ["--shapes", "16x40", "--refresh", "tiny", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, "--out", str(out)])
    methods = runpy.run_path(str(SCRIPT), run_name="__main__")["METHODS"]
    lines = out.read_text().splitlines()
    assert sum(line.startswith("| 16x40 |") for line in lines) == len(methods)
    assert sum("side" in line and line.endswith(" |") for line in lines) >= 4


def test_correlations_tell_a_float32_gram_matrix_where_the_mass_does_not():
    script = runpy.run_path(str(SCRIPT))
    grad = script["gradient"](32, 80, 1e-4, torch.device("cpu"))
    found = {
        name: script["accuracy"](script["METHODS"][name](grad), grad)
        for name in ("svd", "eigh", "eigh of the float32 Gram matrix")
    }
    masses, correlations, _ = zip(*found.values(), strict=True)
    assert max(masses) < 1e-5
    assert max(correlations[:2]) < 1e-2
    assert correlations[2] > 0.1
