"""What each rank computes, keeps and sends on meshes of any size, from plans alone.

    python examples/benchmarks/loads.py --mesh 2x2 2x4 4 8

A mesh is the number of shards (FSDP2), or replicas x shards (HSDP). The 60M LLaMA is on
the meta device and the ranks are threads, so no weight is stored and no step is made.
The load of a rank is the work it does per step, bases included, over the mean.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adadiag import AdaDiag, Report, param_groups
from sharded_adadiag.testing.ranks import run_threads

LAYERS, HIDDEN, FFN, VOCAB, PERIOD = 8, 512, 1376, 32000, 200


def plan(rank: int, sizes: tuple[int, ...], distribution: str) -> Report:
    """The report of one rank; all have the same."""
    names = ("replicate", "shard")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, FFN)] * 2 + [(FFN, HIDDEN)]
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN))
        for _ in range(LAYERS):
            linears = [nn.Linear(a, b, bias=False) for a, b in shapes]
            model.append(fully_shard(nn.Sequential(*linears), mesh=mesh))
        model.append(nn.Linear(HIDDEN, VOCAB, bias=False))
    fully_shard(model, mesh=mesh)
    opt = AdaDiag(param_groups(model), refresh_every=PERIOD, distribution=distribution)
    return opt.describe()


def table(report: Report) -> list[str]:
    """One row per rank."""
    work = [r.step_cost + r.refresh_cost / PERIOD for r in report.ranks]
    bases = [r.refresh_cost for r in report.ranks]
    lines = [
        "| rank | owns | bases, of the mean | step and bases, of the mean "
        "| state MB | MB sent, step | MB sent, refresh |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r, load in zip(report.ranks, work, strict=True):
        lines.append(
            f"| {r.rank} | {r.matrices} "
            f"| {r.refresh_cost / statistics.mean(bases):.3f} "
            f"| {load / statistics.mean(work):.3f} | {r.state_bytes / 1e6:.1f} "
            f"| {r.bytes_per_step / 1e6:.2f} | {r.refresh_bytes / 1e6:.2f} |"
        )
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", nargs="+", default=["2x2", "2x4"])
    parser.add_argument("--distribution", default="auto")
    arguments = parser.parse_args()
    for mesh in arguments.mesh:
        sizes = tuple(int(size) for size in mesh.split("x"))
        ranks = torch.Size(sizes).numel()
        report = run_threads(ranks, plan, sizes, arguments.distribution)[0]
        owned = sum(r.matrices for r in report.ranks)
        print(f"\n### {mesh}: {owned} bases, each computed once in the mesh\n")
        print("\n".join(table(report)))


if __name__ == "__main__":
    main()
