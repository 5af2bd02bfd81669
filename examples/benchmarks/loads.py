"""What each rank computes, keeps and sends on meshes of any size, from plans alone.

    python examples/benchmarks/loads.py --mesh 2x2 2x4 4 8

A mesh is the number of shards (FSDP2), or replicas x shards (HSDP). The 60M LLaMA is on
the meta device, so no weight is stored and no step is made.
The load of a rank is the work it does per step, bases included, over the mean.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_adadiag import AdaDiag, Report, param_groups

LAYERS, HIDDEN, FFN, VOCAB, PERIOD = 8, 512, 1376, 32000, 200


def plan(sizes: tuple[int, ...], distribution: str) -> Report:
    """The report; all ranks have the same."""
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


def worker(
    rank: int, sizes: tuple[int, ...], distribution: str, store: str, queue: Any
) -> None:
    """One rank: a gloo process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=torch.Size(sizes).numel(),
    )
    report = plan(sizes, distribution)
    if rank == 0:
        queue.put(report)
    dist.barrier()
    dist.destroy_process_group()


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
        queue = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            parameters = (sizes, arguments.distribution, store, queue)
            ranks = torch.Size(sizes).numel()
            # The report fits in the queue's pipe, so it may wait there for this join.
            mp.spawn(worker, parameters, nprocs=ranks)
        report = queue.get()
        owned = sum(r.matrices for r in report.ranks)
        print(f"\n### {mesh}: {owned} bases, each computed once in the mesh\n")
        print("\n".join(table(report)))


if __name__ == "__main__":
    main()
