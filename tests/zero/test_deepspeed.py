"""DeepSpeed ZeRO at every stage gives the weights of one process."""

from __future__ import annotations

import pytest
from support.zero_cells import Cell, collectives_per_call, run_cells

from sharded_adadiag.testing.ranks import run_processes

# With a version: examples/deepspeed, if on the path, passes for a package without one.
pytest.importorskip(
    "deepspeed", minversion="0.19", reason="the extra [deepspeed] is not installed"
)

BF16 = {"bf16": {"enabled": True}}
BF16_FP32 = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 6}}
# In float32 averages of squares lose small directions, so that they differ by 1e-4 of a
# step from those of a batch that is added up in another order.
AVERAGES = {"basis_from": "gram", "gram_beta": 0.9, "first_moment": "original"}
AVERAGES["rotation_dtype"] = "float64"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def cells(stage: int) -> list[Cell]:
    """All settings of one stage."""
    found = [
        Cell("plain", stage),
        Cell("accumulation", stage, {"gradient_accumulation_steps": 2}),
        Cell("clipping", stage, {"gradient_clipping": 0.005}),
        Cell("tied", stage, model={"tied": True}),
        Cell("frozen, unused", stage, model={"frozen": True, "unused": True}),
        Cell("client", stage, route="client"),
        Cell("callable", stage, route="callable"),
        Cell(
            "groups of their own",
            stage,
            route="client",
            groups=({"lr": 3e-3, "sides": "one"}, {"lr": 1e-3, "weight_decay": 0.0}),
        ),
        Cell("AdafacDiag", stage, method="AdafacDiag"),
        Cell("HfacDiag", stage, method="HfacDiag"),
        Cell("Gram averages", stage, options=AVERAGES),
        Cell("bf16", stage, BF16),
        Cell("fp16", stage, FP16),
        Cell(
            "scheduler",
            stage,
            {
                "scheduler": {
                    "type": "WarmupLR",
                    "params": {"warmup_max_lr": 2e-3, "warmup_num_steps": 2},
                }
            },
        ),
    ]
    if stage in (1, 2):
        found += [
            Cell("round robin", stage, zero={"round_robin_gradients": True}),
            Cell("offload", stage, zero=OFFLOAD),
            Cell("alignment", stage, zero={"parameter_alignment": True}),
            Cell("small buckets", stage, zero={"reduce_bucket_size": 64}),
            Cell("all-reduce", stage, zero={"reduce_scatter": False}),
            Cell("bf16, fp32 sums", stage, BF16_FP32),
        ]
    if stage == 3:
        found += [
            Cell("sub-groups", stage, zero={"sub_group_size": 100}),
            Cell("offload", stage, zero=OFFLOAD),
            Cell(
                "offload parameters",
                stage,
                zero={**OFFLOAD, "offload_param": {"device": "cpu"}},
            ),
            Cell("zero.Init", stage, init=True),
            Cell("all-reduce", stage, zero={"reduce_scatter": False}),
            Cell("bf16, zero.Init", stage, BF16, init=True),
        ]
    # The branch's first gradients are tiny; eps keeps Adam from blowing up their
    # round-off, by which a batch in parts differs from a whole one.
    branch = {"model": {"branch": True}, "options": {"eps": 1e-5}}
    return [*found, Cell("zero-initialised branch", stage, **branch)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_weights_are_those_of_one_process(stage, world_size):
    """On 3 ranks a quarter of the settings, for time; `main` runs all on both."""
    table = cells(stage) if world_size == 2 else cells(stage)[::4]
    if stage == 3 and world_size == 2:
        table.append(Cell("hpZ", stage, zero={"zero_hpz_partition_size": 2}))
    for results in run_processes(
        world_size, run_cells, world_size, table, timeout_s=240.0
    ):
        for cell in table:
            result = results[cell.name]
            assert result["moved"] > 5e-3, cell.name
            assert result.get("follower", 0.0) == 0.0, (cell.name, result)
            assert result.get("one process", 0.0) <= 1e-6, (cell.name, result)


@pytest.mark.multiprocess
def test_a_call_of_step_makes_two_fused_all_to_alls():
    """However many matrices there are, and none for a call that has none."""
    table = [
        Cell("1", 1),
        Cell("2", 2),
        Cell("3", 3),
        Cell("3 sub-groups", 3, zero={"sub_group_size": 100}),
        Cell("bf16, fp32 sums", 1, BF16_FP32),
        Cell("groups", 2, route="client"),
    ]
    exchange = ("all_reduce_max_", "start_all_to_all", "start_all_to_all")
    for found in run_processes(3, collectives_per_call, 3, table):
        for cell, calls in zip(table, found, strict=True):
            assert exchange in calls, cell.name
            assert calls <= {exchange, exchange[:1]}, cell.name


def main() -> None:
    """Print the table of largest differences; PYTHONPATH has tests/ for it."""
    print("| stage | precision | setting | 2 ranks | 3 ranks |")
    print("| --- | --- | --- | --- | --- |")
    for stage in range(4):
        runs = [run_processes(n, run_cells, n, cells(stage))[0] for n in (2, 3)]
        for cell in cells(stage):
            told = []
            for run in runs:
                kinds = {k: v for k, v in run[cell.name].items() if k != "moved"}
                told.append(", ".join(f"{v:.1e} ({k})" for k, v in kinds.items()))
            print(f"| {stage} | {cell.precision} | {cell.name} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
