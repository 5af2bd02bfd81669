"""The two distributions of the work and "auto": bytes, memory and time under FSDP2.

    python examples/benchmarks/distributions.py --shapes small --out distributions.md

Every rank is a process of its own with one thread (gloo), or has a GPU of its own
(nccl). One launch per number of ranks runs all configurations: each round draws fresh
gradients and lets every configuration take one step with them in turn, so that noise of
the machine hits all alike. Bytes and collectives are what `describe()` says, state is
what the ranks hold, and times are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from sharded_adadiag import AdaDiag

SIDES = ("one", "two")
DISTRIBUTIONS = ("owner", "broadcast", "auto")
LR = 1e-4
COLUMNS = (
    "ranks",
    "sides",
    "distribution",
    "owner / broadcast",
    "MB sent, step",
    "MB sent, refresh",
    "collectives, step",
    "collectives, refresh",
    "state MB, mean",
    "state MB, max",
    "step ms",
    "step CPU ms",
    "refresh ms",
    "refresh CPU ms",
)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The hidden-layer matrices of a LLaMA."""

    layers: int
    hidden: int
    ffn: int

    def model(self, device: torch.device) -> nn.Sequential:
        """All matrices, by layer; made to be sharded, not to be a good network."""
        attention = [(self.hidden, self.hidden)] * 4
        feed_forward = [(self.hidden, self.ffn), (self.ffn, self.hidden)]
        sizes = [*attention, feed_forward[0], feed_forward[0], feed_forward[1]]
        return nn.Sequential(
            *(
                nn.Sequential(
                    *(nn.Linear(*s, bias=False, device=device) for s in sizes)
                )
                for _ in range(self.layers)
            )
        )

    def nbytes(self) -> int:
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn
        return 4 * self.layers * per_layer

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, ffn {self.ffn}"


SHAPES = {"small": Shapes(4, 256, 688), "60m": Shapes(8, 512, 1376)}


@dataclasses.dataclass
class Entry:
    """One configuration in a launch, with its own copy of the weights."""

    sides: str
    distribution: str
    optimizer: AdaDiag
    params: list[Tensor]
    # Wall and CPU milliseconds of each step on this rank.
    steps: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    refreshes: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def entries_of(
    args: argparse.Namespace, device: torch.device, mesh: DeviceMesh
) -> list[Entry]:
    """All configurations, planned for the real T and with their states created."""
    entries = []
    for sides, distribution in itertools.product(args.sides, args.distributions):
        torch.manual_seed(args.seed)
        model = SHAPES[args.shapes].model(device)
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        params = list(model.parameters())
        optimizer = AdaDiag(
            params,
            lr=LR,
            sides=sides,
            basis=args.basis,
            distribution=distribution,
            refresh_every=args.refresh_every,
        )
        optimizer.describe()
        entries.append(Entry(sides, distribution, optimizer, params))
    return entries


def draw_gradients(entries: list[Entry], generator: torch.Generator) -> None:
    """Give every configuration the same fresh gradients."""
    for params in zip(*(entry.params for entry in entries)):
        first = params[0]
        full = torch.empty(first.shape, device=generator.device)
        full.normal_(generator=generator)
        grad = distribute_tensor(
            full, first.device_mesh, first.placements, src_data_rank=None
        )
        for param in params:
            param.grad = grad


def timed_step(entry: Entry, device: torch.device, *, refresh: bool) -> None:
    # The plan is made, so that now this only says whether a basis is due.
    for group in entry.optimizer.param_groups:
        group["refresh_every"] = 1 if refresh else None
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    entry.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
    (entry.refreshes if refresh else entry.steps).append(elapsed)


def schedule(args: argparse.Namespace) -> list[bool]:
    """Whether each timed round is a refresh: such rounds are spread evenly."""
    total = args.rounds + args.refreshes
    marks = [(i + 1) * args.refreshes // total for i in range(total)]
    return [now > before for before, now in itertools.pairwise([0, *marks])]


def slowest(times: list[list[tuple[float, float]]], which: int) -> float:
    """Median over steps of the slowest rank's time, from times by rank and step."""
    return statistics.median(
        max(on_rank[which] for on_rank in step) for step in zip(*times)
    )


def row_of(entry: Entry, world_size: int) -> list[str] | None:
    """The cells of a configuration on rank 0, None on the others."""
    report = entry.optimizer.describe()
    gathered: list[Any] = [None] * world_size
    mine = (entry.optimizer.state_bytes(), entry.steps, entry.refreshes)
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() != 0:
        return None
    state, steps, refreshes = zip(*gathered)
    routes = [matrix.route for matrix in report.matrices]
    sent = max(rank.bytes_per_step for rank in report.ranks)
    on_refresh = max(r.bytes_per_step + r.refresh_bytes for r in report.ranks)
    cells = [
        str(world_size),
        entry.sides,
        entry.distribution,
        f"{routes.count('owner')} / {routes.count('broadcast')}",
        f"{sent / 1e6:.3f}",
        f"{on_refresh / 1e6:.3f}",
        str(report.collectives_per_step),
        str(report.collectives_per_step + report.refresh_collectives),
        f"{statistics.mean(state) / 1e6:.2f}",
        f"{max(state) / 1e6:.2f}",
    ]
    for times in (steps, refreshes):
        cells += [f"{slowest(times, which):.1f}" for which in (0, 1)]
    return cells


def measure(
    args: argparse.Namespace, device: torch.device, mesh: DeviceMesh
) -> list[list[str] | None]:
    entries = entries_of(args, device, mesh)
    generator = torch.Generator(device).manual_seed(args.seed)
    plan = schedule(args)
    for round_ in range(args.warmup + len(plan)):
        refresh = round_ >= args.warmup and plan[round_ - args.warmup]
        draw_gradients(entries, generator)
        for entry in entries:
            timed_step(entry, device, refresh=refresh)
        if args.verbose and dist.get_rank() == 0:
            done = f"round {round_ + 1} of {args.warmup + len(plan)}"
            kind = "refresh" if refresh or round_ == 0 else "step"
            print(f"{mesh.size()} ranks: {done} ({kind})", file=sys.stderr, flush=True)
    for entry in entries:
        entry.steps = entry.steps[args.warmup :]
    return [row_of(entry, mesh.size()) for entry in entries]


def worker(
    rank: int, world_size: int, store: str, args: argparse.Namespace, queue: Any
) -> None:
    torch.set_num_threads(1)
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" else None,
    )
    rows = measure(args, device, init_device_mesh(device.type, (world_size,)))
    if rank == 0:
        queue.put(rows)
    # A process that still holds a DeviceMesh at interpreter exit may abort with gloo.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def launch(world_size: int, args: argparse.Namespace) -> list[list[str]]:
    """The rows of one number of ranks, from processes of their own."""
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        # The rows fit in the queue's pipe, so they may wait there for this join.
        mp.spawn(worker, (world_size, store, args, queue), nprocs=world_size)
    return queue.get()


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if models:
            return f"{len(models)} x {models[0]}"
    return platform.processor() or platform.machine()


def machine(args: argparse.Namespace) -> str:
    device = processor()
    backend = "gloo, 1 thread per rank"
    if args.device == "cuda":
        device = f"{torch.cuda.get_device_name(0)} ({device})"
        backend = "nccl, 1 GPU per rank"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{device}; {backend}; torch {torch.__version__}; float32; ranks "
        f"{', '.join(map(str, args.ranks))}; basis {args.basis}, planned for one every "
        f"{args.refresh_every} steps; seed {args.seed}; {args.rounds} ordinary and "
        f"{args.refreshes} refresh steps after {args.warmup} untimed; load {load}; "
        f"{datetime.date.today().isoformat()}"
    )


def heading(args: argparse.Namespace) -> list[str]:
    shapes = SHAPES[args.shapes]
    # Two all-gathers and a reduce-scatter of everything.
    traffic = ", ".join(
        f"{3 * shapes.nbytes() * (n - 1) / n / 1e6:.1f} MB at {n} ranks"
        for n in args.ranks
    )
    return [
        machine(args),
        "",
        f"### {shapes}: {7 * shapes.layers} matrices, {shapes.nbytes() / 1e6:.1f} MB",
        "",
        "MB sent is per step by the rank that sends most, and times are medians of the "
        "slowest rank; a refresh step renews every basis. FSDP2 itself sends, per rank "
        f"and step, {traffic}.",
        "",
        line_of(COLUMNS),
        line_of(["---:", "---", "---"] + ["---:"] * (len(COLUMNS) - 3)),
    ]


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=SHAPES, default="small")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--distributions", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS
    )
    parser.add_argument("--basis", choices=["svd", "eigh"], default="svd")
    parser.add_argument(
        "--refresh-every",
        type=int,
        default=200,
        metavar="T",
        help='for the plan, because "auto" weighs it; not for the timed steps',
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed ordinary steps")
    parser.add_argument("--refreshes", type=int, default=1, help="timed refresh steps")
    parser.add_argument(
        "--warmup", type=int, default=2, help="untimed steps; the first is a refresh"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: GPUs if there is one for each rank",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    parser.add_argument("--verbose", action="store_true", help="print each round")
    args = parser.parse_args(argv)
    if min(args.ranks) < 2:
        parser.error("--ranks: a distribution needs at least 2")
    if min(args.rounds, args.refreshes, args.warmup) < 1:
        parser.error("--rounds, --refreshes and --warmup must be at least 1")
    enough = torch.cuda.device_count() >= max(args.ranks)
    if args.device == "cuda" and not enough:
        parser.error(f"--device cuda needs {max(args.ranks)} GPUs")
    if args.device == "auto":
        args.device = "cuda" if enough else "cpu"
    return args


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = heading(args)
    print("\n".join(lines), flush=True)
    for world_size in args.ranks:
        rows = [line_of(cells) for cells in launch(world_size, args)]
        print("\n".join(rows), flush=True)
        lines += rows
        # After each launch, so that a later one that fails costs no rows.
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
