"""DeepSpeed's ZeRO: what AdaDiag, DeepSpeed's AdamW and DeepSpeed's Muon cost.

    python examples/benchmarks/zero.py --stages 1 2 3 --ranks 2 4 --out zero.md

A LLaMA with a tiny batch, so that little but the optimizers takes time; float32, one
process and one thread per rank, gloo. One launch per stage and number of ranks trains
with the three in turn, so that noise of the machine hits all alike; times are of
backward pass and step together, since Muon does its work in both, and are given as
ratios to AdamW's in the same round.

Bytes are counted below Python, at torch's collectives, in forward, backward and step;
what AdamW sends is what ZeRO sends anyway, so the others are also given beyond it. Of
n bytes per rank on W ranks a rank sends to others, as a ring does: (W-1) n in an
all-gather, (W-1)/W n in a reduce-scatter, a broadcast (the mean of its ranks) and a
reduce, 2 (W-1)/W n in an all-reduce; in an all-to-all what it has for others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deepspeed"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributions import line_of, processor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB, SEQUENCE = 2048, 16
MODEL = (
    *("--hidden", "256", "--ffn", "688", "--layers", "4", "--heads", "4"),
    *("--vocab", str(VOCAB), "--sequence", str(SEQUENCE)),
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"torch_adam": True},  # without, DeepSpeed compiles one of its own
    "AdaDiag": {"refresh_every": None},  # changed step by step below
    "Muon": {"torch_adam": True},
}
LR = 1e-4
WARMUP = 3  # untimed steps: plans, states, prefetch traces, the first basis

TRAFFIC_COLUMNS = (
    *("stage", "ranks", "optimizer", "MB sent, mean", "MB sent, most"),
    *("beyond AdamW", "in optimizer.step", "refresh: beyond AdamW"),
    *("state MB, mean", "state MB, most"),
)
TIME_COLUMNS = (
    *("stage", "ranks", "optimizer", "x AdamW", "x AdamW, CPU time"),
    *("refresh: x AdamW", "refresh: x AdamW, CPU time"),
)


def sent(name: str, args: tuple[Any, ...], rank: int, world_size: int) -> float:
    """Bytes that a rank sends in a collective, an operator of torch.ops.c10d."""
    share = (world_size - 1) / world_size
    if name == "alltoall_base_":
        given, splits = args[1], args[4]
        if not splits:
            return given.nbytes * share
        rows = sum(splits)
        row = given.nbytes / rows if rows else 0.0
        return (rows - splits[rank]) * row
    if name in ("allreduce_", "allreduce_coalesced_"):
        return 2 * share * nbytes(args[0])
    if name in ("broadcast_", "reduce_"):
        return share * nbytes(args[0])
    if name in ("_reduce_scatter_base_", "reduce_scatter_"):
        return share * nbytes(args[1])
    if name == "reduce_scatter_tensor_coalesced_":
        return share * nbytes(args[1])
    if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
        return (world_size - 1) * nbytes(args[1])
    if name == "barrier":
        return 0.0
    raise NotImplementedError(f"no rule for {name}")


def nbytes(tensors: Any) -> int:
    """Of a tensor, or of lists of them."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(nbytes, tensors))


class Traffic(TorchDispatchMode):
    """Counts what this rank sends while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.bytes += sent(name, args, self.rank, self.world_size)
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass
class Entry:
    """One optimizer in a launch, with its own model and engine."""

    name: str
    engine: Any
    # Bytes that this rank sends in a step, of them within the optimizer's own
    # step(), and in a refresh step.
    step_bytes: float = 0.0
    in_step: float = 0.0
    refresh_bytes: float = 0.0
    # Wall and CPU seconds on this rank.
    steps: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    refreshes: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer

    def train_step(
        self, tokens: Tensor, *, refresh: bool = False
    ) -> tuple[float, float]:
        """Returns the wall and CPU seconds of backward pass and step."""
        from llama import token_loss

        if self.name == "AdaDiag":
            for group in self.optimizer.param_groups:
                group["refresh_every"] = 1 if refresh else None
        loss = token_loss(self.engine, tokens, reduction="mean")
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        self.engine.backward(loss)
        self.engine.step()
        return time.perf_counter() - wall, time.process_time() - cpu

    def count(self, tokens: Tensor, *, refresh: bool = False) -> tuple[float, float]:
        """Bytes sent in a step, and those of them within the optimizer's step()."""
        with Traffic() as whole, self._within_step(whole) as inner:
            self.train_step(tokens, refresh=refresh)
        return whole.bytes, inner[0]

    @contextlib.contextmanager
    def _within_step(self, traffic: Traffic) -> Generator[list[float]]:
        total = [0.0]

        def before(*_: Any) -> None:
            total[0] -= traffic.bytes

        def after(*_: Any) -> None:
            total[0] += traffic.bytes

        hooks = (
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        )
        yield total
        for hook in hooks:
            hook.remove()

    def state_bytes(self) -> int:
        """Of all tensors in the optimizer's state."""
        found: dict[int, int] = {}

        def visit(value: Any) -> None:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, dict):
                for item in value.values():
                    visit(item)

        visit(dict(self.optimizer.state))
        return sum(found.values())


def build(name: str, stage: int) -> Entry:
    import deepspeed
    from llama import build_model
    from settings import parse

    zero: dict[str, Any] = {"stage": stage}
    if (name, stage) == ("Muon", 3):
        zero["reduce_scatter"] = False  # DeepSpeed refuses it otherwise
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "optimizer": {"type": name, "params": {"lr": LR, **OPTIMIZERS[name]}},
    }
    model = build_model(parse(list(MODEL)))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    return Entry(name, engine)


def measure(stage: int, args: argparse.Namespace) -> list[Entry]:
    entries = [build(name, stage) for name in OPTIMIZERS]
    generator = torch.Generator().manual_seed(dist.get_rank())

    def tokens() -> Tensor:
        return torch.randint(0, VOCAB, (1, SEQUENCE + 1), generator=generator)

    for _ in range(WARMUP):
        data = tokens()
        for entry in entries:
            entry.train_step(data, refresh=True)
    for entry in entries:
        entry.train_step(data)
        entry.step_bytes, entry.in_step = entry.count(data)
        entry.refresh_bytes, _ = entry.count(data, refresh=True)
    rounds = args.rounds if dist.get_world_size() in args.timed_ranks else 0
    for round_ in range(rounds):
        refresh = round_ % 4 == 3
        data = tokens()
        for entry in entries[round_ % 3 :] + entries[: round_ % 3]:
            elapsed = entry.train_step(data, refresh=refresh)
            (entry.refreshes if refresh else entry.steps).append(elapsed)
    return entries


def traffic_rows(stage: int, entries: list[Entry]) -> list[str]:
    """One row for each optimizer, on every rank alike."""
    world_size = dist.get_world_size()
    rows, usual = [], [0.0, 0.0]
    for entry in entries:
        mine = (entry.step_bytes, entry.in_step, entry.refresh_bytes)
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, (*mine, entry.state_bytes()))
        step, in_step, refresh, state = zip(*gathered)
        means = [statistics.mean(step), statistics.mean(refresh)]
        if entry.name == "AdamW":
            usual = means
        ours = entry.name == "AdaDiag"
        numbers = [statistics.mean(step), max(step), means[0] - usual[0]]
        numbers += [statistics.mean(in_step), means[1] - usual[1]]
        cells = [f"{value / 1e6:.2f}" for value in numbers]
        cells[-1] = cells[-1] if ours else ""
        cells += [f"{v / 1e6:.2f}" for v in (statistics.mean(state), max(state))]
        rows.append(line_of([str(stage), str(world_size), entry.name, *cells]))
    return rows


def time_rows(stage: int, entries: list[Entry]) -> list[str]:
    """Medians over rounds of the ratio to AdamW, of the slowest rank."""
    world_size = dist.get_world_size()
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, [(e.steps, e.refreshes) for e in entries])
    rows = []
    for i, entry in enumerate(entries):
        if entry.name == "AdamW":
            continue
        cells = []
        for kind in (0, 1):
            own = [by_rank[i][kind] for by_rank in gathered]
            base = [by_rank[0][kind] for by_rank in gathered]
            for which in (0, 1):
                ratios = [
                    max(rank[which] for rank in mine)
                    / max(rank[which] for rank in usual)
                    for mine, usual in zip(zip(*own), zip(*base))
                ]
                cells.append(f"{statistics.median(ratios):.2f}")
        if entry.name != "AdaDiag":
            cells[2:] = ["", ""]
        rows.append(line_of([str(stage), str(world_size), entry.name, *cells]))
    return rows


def worker(
    rank: int, world_size: int, args: argparse.Namespace, folder: str, port: int
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # DeepSpeed's, many at each step
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    import deepspeed
    import starting
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    starting.prepare()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for stage in args.stages:
        entries = measure(stage, args)
        rows = {"traffic": traffic_rows(stage, entries)}
        if entries[0].steps:
            rows["time"] = time_rows(stage, entries)
        if rank == 0:
            for kind, lines in rows.items():
                with Path(folder, kind).open("a") as file:
                    file.writelines(line + "\n" for line in lines)
                print("\n".join(lines), file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def launch(args: argparse.Namespace) -> list[str]:
    """Both tables, from processes of their own for each number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for world_size in args.ranks:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            mp.spawn(worker, (world_size, args, folder, port), nprocs=world_size)
        lines = []
        for kind, columns in (("traffic", TRAFFIC_COLUMNS), ("time", TIME_COLUMNS)):
            path = Path(folder, kind)
            if path.exists():
                rule = ["---:", "---:", "---"] + ["---:"] * (len(columns) - 3)
                rows = path.read_text().splitlines()
                lines += ["", line_of(columns), line_of(rule), *rows]
    return lines


def heading(args: argparse.Namespace) -> str:
    import deepspeed

    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{processor()}; gloo, 1 thread per rank; torch {torch.__version__}; deepspeed"
        f" {deepspeed.__version__}; float32; {' '.join(MODEL)};"
        f" {args.rounds} rounds after {WARMUP}, every fourth a refresh; load {load};"
        f" {datetime.date.today().isoformat()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--timed-ranks", type=int, nargs="*", default=[2], help="numbers to time too"
    )
    parser.add_argument("--rounds", type=int, default=16, help="timed steps")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    # DS_ACCELERATOR: one device for all; the other: Muon's first step would compile.
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    text = "\n".join([heading(args), *launch(args)])
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
