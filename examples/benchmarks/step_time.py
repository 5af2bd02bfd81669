"""Milliseconds per optimizer step and bytes of state, ours beside others.

    python examples/benchmarks/step_time.py --shapes both --out step_time.md

Every round draws fresh gradients and lets each optimizer take one step with them in
turn, so that noise of the machine hits all alike. Only the hidden-layer matrices are
stepped: they are what the optimizers treat differently. The median is that of ordinary
steps, which refresh no basis in any of them; the longest step is one that does. Peers
whose package is missing are named below the table (see peers.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from floor import Floor, Matrices
from peers import LR, PEERS
from torch import Tensor
from tqdm import tqdm

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag

LLAMA_60M = [(512, 512)] * 32 + [(1376, 512)] * 16 + [(512, 1376)] * 8
SMALL_GPT = [(768, 256)] * 4 + [(256, 256)] * 4 + [(1024, 256)] * 4 + [(256, 1024)] * 4
SHAPES = {
    "60m": ("60M LLaMA, 56 matrices", LLAMA_60M),
    "gpt": ("small GPT, 16 matrices", SMALL_GPT),
}
FLOORS = {"floor, one-sided": False, "floor, two-sided": True}
OURS = {
    "AdaDiag": functools.partial(AdaDiag, sides="one", basis="svd"),
    "AdaDiag, eigh": functools.partial(AdaDiag, sides="one", basis="eigh"),
    "AdafacDiag": functools.partial(AdafacDiag, sides="one", momentum=True),
    "AdafacDiag, no momentum": functools.partial(
        AdafacDiag, sides="one", momentum=False
    ),
    "HfacDiag": functools.partial(HfacDiag, sides="one"),
    "AdaDiag++": functools.partial(AdaDiag, sides="two", basis="svd"),
    "AdaDiag++, eigh": functools.partial(AdaDiag, sides="two", basis="eigh"),
    "AdaDiag, sides none": functools.partial(AdaDiag, sides="none"),
}
# The marks of a page that has the tables.
BEGIN, END = "<!-- step_time.py -->", "<!-- end -->"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BASELINE = "torch AdamW, fused"
FLOOR_OF = {
    "AdaDiag": "floor, one-sided",
    "AdaDiag, eigh": "floor, one-sided",
    "AdaDiag++": "floor, two-sided",
    "AdaDiag++, eigh": "floor, two-sided",
}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside a state, those kept in objects of the optimizer too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def state_bytes(optimizer: Any) -> int:
    """Bytes of all state, a storage that several tensors share counted once."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    storages = {}
    for state in optimizer.state.values():
        for tensor in _tensors(state):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclasses.dataclass
class Entry:
    """One optimizer in the run, with its own copy of the weights."""

    name: str
    optimizer: Any
    params: list[Tensor]
    times_ms: list[float] = dataclasses.field(default_factory=list)
    ordinary: list[bool] = dataclasses.field(default_factory=list)

    def give(self, grads: Matrices) -> None:
        """Gradients of its own: some optimizers change or drop what they are given."""
        if isinstance(self.optimizer, Floor):
            return
        for param, grad in zip(self.params, grads.views(), strict=True):
            if param.grad is None:
                param.grad = torch.empty_like(grad)
            param.grad.copy_(grad)

    @property
    def median(self) -> float:
        """Milliseconds of an ordinary step."""
        return statistics.median(
            t for t, ordinary in zip(self.times_ms, self.ordinary) if ordinary
        )


def contestants(
    names: list[str], weights: Matrices, grads: Matrices, every: int
) -> tuple[list[Entry], list[str]]:
    """Each optimizer on its own copy of the weights, and those not installed."""
    entries, missing = [], []
    for name in names:
        own = Matrices([], weights.stacks[0].device)
        own.stacks = [stack.clone() for stack in weights.stacks]
        if name in FLOORS:
            floor = Floor(own, grads, two_sided=FLOORS[name])
            entries.append(Entry(name, floor, own.views()))
            continue
        params = [torch.nn.Parameter(view) for view in own.views()]
        try:
            if name in OURS:
                group = {"params": params, "rotate": True}
                optimizer = OURS[name]([group], lr=LR, refresh_every=every)
            else:
                optimizer = PEERS[name](params, every)
        except ImportError:
            missing.append(name)
            continue
        entries.append(Entry(name, optimizer, params))
    return entries, missing


def is_ordinary(step: int, every: int) -> bool:
    """Whether no optimizer refreshes a basis: ours after step 1, others around it."""
    return step % every not in {every - 1, 0, 1}


def timed(
    step: Callable[[], Any], device: torch.device, clock: Callable[[], float]
) -> float:
    synchronize = device.type == "cuda"
    if synchronize:
        torch.cuda.synchronize(device)
    start = clock()
    step()
    if synchronize:
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - start)


def run(
    shapes: list[tuple[int, int]], names: list[str], args: argparse.Namespace
) -> tuple[list[Entry], list[str]]:
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(args.seed)
    weights, fresh, grads = (Matrices(shapes, device) for _ in range(3))
    weights.normal_(generator, 0.02)
    entries, missing = contestants(names, weights, grads, args.refresh_every)
    for step in tqdm(range(1, args.warmup + args.rounds + 1), unit="round"):
        fresh.normal_(generator, 1.0)
        for entry in entries:
            # Every optimizer meets the same values, as warm in the cache for all.
            grads.copy_(fresh)
            entry.give(fresh)
            elapsed = timed(entry.optimizer.step, device, CLOCKS[args.clock])
            if step > args.warmup:
                entry.times_ms.append(elapsed)
                entry.ordinary.append(is_ordinary(step, args.refresh_every))
    for entry in entries:
        if not all(torch.isfinite(param).all() for param in entry.params):
            raise RuntimeError(f"{entry.name}: weights are no longer finite")
    return entries, missing


def table(title: str, entries: list[Entry], missing: list[str]) -> str:
    weight_bytes = sum(param.nbytes for param in entries[0].params)
    by_name = {entry.name: entry for entry in entries}
    lines = [
        f"### {title}, {weight_bytes / 4e6:.1f} M elements",
        "",
        "| optimizer | step, ms | x AdamW | x AdaDiag | longest | state / weights |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        ratios = [
            f"{entry.median / by_name[other].median:.2f}" if other in by_name else "-"
            for other in (BASELINE, "AdaDiag")
        ]
        lines.append(
            f"| {entry.name} | {entry.median:.1f} | {' | '.join(ratios)} "
            f"| {max(entry.times_ms):.1f} "
            f"| {state_bytes(entry.optimizer) / weight_bytes:.2f} |"
        )
    for name, floor in FLOOR_OF.items():
        if name in by_name and floor in by_name:
            ratio = by_name[name].median / by_name[floor].median
            lines.append(f"\n{name} / {floor}: {ratio:.2f}")
    if missing:
        lines.append(f"\nNot installed: {', '.join(missing)}.")
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> str:
    device = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        device = f"{len(models)} x {models[0]}" if models else device
    if args.device.startswith("cuda"):
        device = f"{torch.cuda.get_device_name(args.device)} ({device})"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{device}; {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"float32; seed {args.seed}; {args.rounds} rounds after {args.warmup}; "
        f"a basis every {args.refresh_every} steps; {args.clock} time; load {load}; "
        f"{datetime.date.today().isoformat()}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    names = [*FLOORS, *OURS, *PEERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps first")
    parser.add_argument("--refresh-every", type=int, default=10, metavar="T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help="; ".join(names)
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of all threads, for a busy machine (not for a GPU)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    parser.add_argument("--page", type=Path, help="put the tables between its marks")
    args = parser.parse_args(argv)
    args.only = args.only or names
    steps = range(args.warmup + 1, args.warmup + args.rounds + 1)
    if not any(is_ordinary(step, args.refresh_every) for step in steps):
        parser.error("no timed step is without a refresh: more --rounds or a larger T")
    if args.clock == "cpu" and args.device != "cpu":
        parser.error(f"--clock cpu does not see the work of --device {args.device}")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    parts = [machine(args)]
    print(parts[0], flush=True)
    for key in SHAPES if args.shapes == "both" else [args.shapes]:
        title, shapes = SHAPES[key]
        parts.append(table(title, *run(shapes, args.only, args)))
        print("\n" + parts[-1], flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n\n".join(parts) + "\n")
    if args.page is not None:
        before, rest = args.page.read_text().split(BEGIN)
        _, after = rest.split(END)
        parts[0] = textwrap.fill(parts[0], 110)
        text = "\n\n".join(["", *parts, ""])
        args.page.write_text(f"{before}{BEGIN}{text}{END}{after}")


if __name__ == "__main__":
    main()
