"""How a step of the optimizer scales from one rank to two, and what memory it takes.

    OMP_NUM_THREADS=1 python examples/benchmarks/scaling.py --out scaling.json

The hidden matrices of a 60M LLaMA on one process, and sharded by FSDP2's rows over two
gloo processes, in interleaved pairs: one rank steps alone while the other waits, then
both step together. Printed is t1 / (2 t2): 1 would be perfect. Steps refresh no basis.
Memory is the most that ordinary steps take above weights, gradients and states.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import threading
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

SHAPES = [(512, 512)] * 32 + [(1376, 512)] * 16 + [(512, 1376)] * 8
BUDGETS = {"default": None, "16 MB": 16_000_000}


def matrices(mesh: Any | None) -> list[tuple[str, nn.Parameter]]:
    named = []
    for i, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(shape, generator=generator)
        if mesh is not None:
            weight = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
        param = nn.Parameter(weight)
        param.grad = torch.randn_like(param).detach()
        named.append((f"layer.{i}.weight", param))
    return named


def optimizer(mesh: Any | None, **options: Any) -> AdaDiag:
    group = {"params": matrices(mesh), "rotate": True}
    return AdaDiag([group], lr=1e-4, refresh_every=None, **options)


def seconds(opt: AdaDiag, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        opt.step()
    return (time.perf_counter() - start) / steps


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


def extra_memory(opt: AdaDiag) -> int:
    """Bytes that ordinary steps take at most above weights, gradients and states."""
    opt.state_bytes()  # creates the states
    for state in opt.state.values():
        for value in state.values():
            value.mul_(1)  # touches its pages
    before = most = anonymous()
    opt.step()  # makes all bases, which takes what it takes
    ctypes.CDLL(None).malloc_trim(0)  # and leaves freed memory behind
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        opt.step()
    done.set()
    watcher.join()
    return most - before


def run(rank: int, port: int, pairs: int, steps: int, out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {"extra_memory_bytes": {}, "t1": [], "t2": {}}
    sharded = {}
    for name, budget in BUDGETS.items():
        sharded[name] = optimizer(mesh, buffer_bytes=budget)
        found["extra_memory_bytes"][name] = extra_memory(sharded[name])
        found["t2"][name] = []
    alone = optimizer(None) if rank == 0 else None
    if alone is not None:
        alone.step()
    for pair in range(pairs + 1):
        dist.barrier()
        if alone is not None:
            found["t1"].append(seconds(alone, steps))
        for name, opt in sharded.items():
            dist.barrier()
            found["t2"][name].append(seconds(opt, steps))
        if rank == 0:
            print(f"pair {pair} of {pairs}" + (" (warm-up)" if pair == 0 else ""))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        out.put(summary(everyone))
    dist.barrier()
    dist.destroy_process_group()


def summary(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    t1 = everyone[0]["t1"][1:]
    result: dict[str, Any] = {"t1_ms": 1e3 * statistics.median(t1)}
    for name in BUDGETS:
        slowest = [max(pair) for pair in zip(*(one["t2"][name] for one in everyone))]
        ratios = [a / (2 * b) for a, b in zip(t1, slowest[1:])]
        result[name] = {
            "t2_ms": 1e3 * statistics.median(slowest[1:]),
            "efficiency": statistics.median(ratios),
            "efficiencies": [round(ratio, 3) for ratio in ratios],
            "extra_memory_mb": max(
                one["extra_memory_bytes"][name] / 1e6 for one in everyone
            ),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--port", type=int, default=29611)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    out = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run, (asked.port, asked.pairs, asked.steps, out), nprocs=2)
    found = out.get()
    print(json.dumps(found, indent=2))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
