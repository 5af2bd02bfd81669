"""The longest step of the optimizer beside an ordinary one: who waits for new bases.

    OMP_NUM_THREADS=1 python examples/benchmarks/stalls.py --model gpt
    OMP_NUM_THREADS=1 python examples/benchmarks/stalls.py --model 60m --ranks 2

The hidden matrices of a model on one process, or sharded by FSDP2's rows over gloo
processes. After the first step, which makes all bases, each way takes two periods of
steps, one way after the other: all bases in one step (the paper), in slots (as many as
the plan takes), and in slots with a lag. A step takes as long as on its slowest rank.
Steps follow each other with nothing between them, so that what is computed beside them
has only the machine's other cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sharded_adadiag import AdaDiag

MODELS = {
    "60m": [(512, 512)] * 32 + [(1376, 512)] * 16 + [(512, 1376)] * 8,
    "gpt": [(768, 256)] * 4 + [(256, 256)] * 4 + [(1024, 256)] * 4 + [(256, 1024)] * 4,
    "tiny": [(32, 32)] * 4 + [(32, 48)] * 2,
}
PERIODS = 2
LAG_AT_ONCE = 16  # all bases take as long as some ten steps


def ways(lag: int) -> dict[str, dict[str, Any]]:
    return {
        "all at once": {},
        "slots": {"refresh_slots": "auto"},
        "slots and lag": {"refresh_slots": "auto", "refresh_lag": lag},
        "lag": {"refresh_lag": LAG_AT_ONCE},
    }


def optimizer(model: str, mesh: Any | None, **options: Any) -> AdaDiag:
    named = []
    for i, shape in enumerate(MODELS[model]):
        generator = torch.Generator().manual_seed(i)
        weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        if mesh is not None:
            weight, grad = (
                distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
                for value in (weight, grad)
            )
        param = nn.Parameter(weight)
        param.grad = grad
        named.append((f"layer.{i}.weight", param))
    return AdaDiag([{"params": named, "rotate": True}], lr=1e-4, **options)


def step_times(opt: AdaDiag, steps: int) -> list[float]:
    opt.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        opt.step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def run(rank: int, asked: argparse.Namespace, out: Any) -> None:
    torch.set_num_threads(1)
    mesh = None
    if asked.ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked.port)}
        dist.init_process_group("gloo", rank=rank, world_size=asked.ranks)
        mesh = init_device_mesh("cpu", (asked.ranks,))
    rows = []
    for name, options in ways(asked.lag).items():
        if name not in asked.ways:
            continue
        every = asked.refresh_every
        opt = optimizer(asked.model, mesh, refresh_every=every, **options)
        own = step_times(opt, PERIODS * every)
        times: list[Any] = [own]
        if mesh is not None:
            times = [None] * asked.ranks
            dist.all_gather_object(times, own)
        group = opt.param_groups[0]
        slots, lag = group.get("refresh_slots", 1), group.get("refresh_lag", 0)
        slowest = [max(each) for each in zip(*times)]
        rows.append(summary(name, slots, lag, slowest))
    if rank == 0:
        out.put(rows)
    if mesh is not None:
        dist.barrier()
        dist.destroy_process_group()


def summary(name: str, slots: int, lag: int, times: list[float]) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "way": name,
        "slots": slots,
        "lag": lag,
        "median_ms": round(median, 1),
        "longest_ms": round(max(times), 1),
        "longest_over_median": round(max(times) / median, 2),
        "period_s": round(sum(times) / PERIODS / 1e3, 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ["way", "K", "L", "median ms", "longest ms", "longest / median", "period s"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * 6 + "|"]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--refresh-every", type=int, default=64)
    parser.add_argument("--lag", type=int, default=2, help="of the way with slots")
    parser.add_argument(
        "--ways", nargs="+", choices=list(ways(0)), default=list(ways(0))
    )
    parser.add_argument("--port", type=int, default=29613)
    parser.add_argument("--out", type=Path, help="for the figures as JSON")
    asked = parser.parse_args(arguments)
    out = mp.get_context("spawn").SimpleQueue()
    if asked.ranks == 1:
        run(0, asked, out)
    else:
        mp.spawn(run, (asked, out), nprocs=asked.ranks)
    rows: list[dict[str, Any]] = out.get()
    print(table(rows))
    if asked.out is not None:
        asked.out.write_text(json.dumps(rows, indent=2))
    return rows


if __name__ == "__main__":
    main()
