"""DeepSpeed's checkpoints resume exactly, and portable ones move to FSDP2 and back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.zero_cells import OPTIONS, Cell, loss_of, sorted_groups, weights
from support.zero_cells import Model as CellModel
from support.zero_checkpoints import (
    END,
    HALF,
    fsdp2,
    load_portable,
    load_universal,
    rigid,
    save_deepspeed,
    save_portable,
)
from torch import Tensor

from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.ranks import run_processes
from sharded_adadiag.testing.reference import ReferenceOptimizer

# With a version: examples/deepspeed, if on the path, passes for a package without one.
pytest.importorskip(
    "deepspeed", minversion="0.19", reason="the extra [deepspeed] is not installed"
)

BF16 = {"bf16": {"enabled": True}}
AVERAGES = {"basis_from": "gram", "gram_beta": 0.9, "first_moment": "original"}
BF16_FP32 = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}


def uninterrupted(
    steps: int = END, *, refresh_at: int | None = None, **options: bool
) -> dict[str, Tensor]:
    """One process, by the slow reference; one more basis at a step if asked for."""
    model = CellModel(**options)
    start = weights(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(start[name])
    groups = [
        {**group, "params": [p for _, p in group["params"] if p.requires_grad]}
        for group in sorted_groups(model.named_parameters())
    ]
    reference = ReferenceOptimizer("adadiag", groups, **OPTIONS)
    for step in range(steps):
        for param in model.parameters():
            param.grad = None
        loss_of(model, step, slice(None)).backward()
        for group in reference.param_groups:
            # With T = 1 every step has a new basis.
            period = 1 if step == refresh_at else OPTIONS["refresh_every"]
            group["refresh_every"] = period
        reference.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0.0, msg=name)


@pytest.mark.multiprocess
def test_deepspeeds_own_checkpoint_resumes_bit_for_bit(tmp_path):
    """At every stage and precision, factored moments too."""
    table = [
        Cell("0", 0),
        Cell("0 bf16", 0, BF16),
        Cell("1", 1),
        Cell("1 bf16", 1, BF16),
        Cell("1 bf16, fp32 sums", 1, BF16_FP32),
        Cell("2", 2),
        Cell("2 AdafacDiag", 2, method="AdafacDiag"),
        Cell("2 client", 2, route="client"),
        Cell("3", 3),
        Cell("3 bf16", 3, BF16),
        Cell("3 sub-groups", 3, zero={"sub_group_size": 100}),
        Cell("3 HfacDiag", 3, method="HfacDiag"),
        Cell("2 Gram averages", 2, options=AVERAGES),
        Cell("3 Gram averages", 3, options=AVERAGES),
        Cell("3 bf16 state", 3, options={"state_dtype": "bfloat16"}),
        # The basis of the step before is on its way.
        Cell("1 lag", 1, options={"refresh_lag": 2}),
        Cell("2 bf16 lag", 2, BF16, options={"refresh_lag": 1, "refresh_slots": 2}),
        Cell("3 lag", 3, options={"refresh_lag": 1}),
    ]
    for results in run_processes(2, rigid, 2, table, str(tmp_path), timeout_s=240.0):
        for cell in table:
            whole, resumed = results[cell.name]
            for name, value in whole.items():
                assert_equal(resumed[name], value, f"{cell.name}: {name}")


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_universal_checkpoint_goes_on_with_new_bases_and_says_so(stage, tmp_path):
    """Written by 2 ranks, read by 3; the reference has a basis more at that step."""
    cell = Cell("universal", stage)
    run_processes(2, save_deepspeed, 2, cell, str(tmp_path), timeout_s=240.0)
    program = "deepspeed.checkpoint.ds_to_universal"
    folders = [
        *("--input_folder", str(tmp_path / "half")),
        *("--output_folder", str(tmp_path / "half_universal")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", program, *folders, "--inject_missing_state"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    Path(tmp_path / "latest_universal").write_text("half_universal")
    loading = dataclasses.replace(cell, config={"checkpoint": {"load_universal": True}})
    results = run_processes(3, load_universal, 3, loading, str(tmp_path))
    at_load, after = uninterrupted(HALF), uninterrupted(END, refresh_at=HALF)
    for loaded, final, said in results:
        compare(loaded, at_load)
        compare(final, after)
        assert len(said) == 1 and "bases" in said[0]


@pytest.mark.multiprocess
def test_a_run_moves_from_zero_3_to_fsdp2_and_back(tmp_path):
    """With a frozen parameter, which must travel too."""
    want = uninterrupted(frozen=True)
    folder = str(tmp_path / "zero")
    run_processes(
        4, save_portable, 4, Cell("portable", 3, model={"frozen": True}), folder
    )
    for final in run_processes(2, fsdp2_load, 2, folder):
        compare(final, want)
    folder = str(tmp_path / "fsdp2")
    run_processes(2, fsdp2_save, 2, folder)
    for stage in (1, 3):
        cell = Cell("portable", stage, model={"frozen": True})
        for final in run_processes(2, load_portable, 2, cell, folder):
            compare(final, want)


def fsdp2_load(rank, world_size, folder):
    return fsdp2(rank, world_size, folder, load=True)


def fsdp2_save(rank, world_size, folder):
    return fsdp2(rank, world_size, folder, load=False)
