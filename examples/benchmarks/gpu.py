"""What ours and the optimizers of others cost on a GPU, all in one command.

    python examples/benchmarks/gpu.py --out gpu
    python examples/benchmarks/gpu.py --device cpu --tiny   # a trial without a GPU

Three parts, each with a table; the files in the folder are written after each of them,
so that a run that is cut short keeps what it has measured.

* Decompositions: milliseconds of torch's and of AdaDiag's step with a refresh, which is
  hardly more than its decomposition; and how far the columns are from orthonormal.
* Steps: the hidden matrices of the paper's LLaMAs, one optimizer at a time. An ordinary
  step refreshes no basis in any optimizer; the longest is the longest of those around
  a refresh. The peak is what states and working memory took at most, beside weights
  and gradients; the CPU does not tell it.
* Training: forward, backward and step of a whole LLaMA, in bfloat16 autocast on a GPU.

A peer that is not installed, or that does not fit in memory, is a row that says so.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from floor import Matrices
from peers import LR, PEERS
from step_time import (
    CLOCKS,
    contestants,
    is_ordinary,
    machine,
    state_bytes,
    timed,
)
from torch import Tensor
from tqdm import tqdm

from sharded_adadiag import AdaDiag, param_groups

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama import build_model, token_loss
from settings import PRESETS, Preset

Row = dict[str, Any]
Task = tuple[Row, Callable[[], Row]]  # what is measured, and what measures it
Decomposition = Callable[[], list[Tensor]]  # to orthonormal columns

SIZES = [(n, n) for n in (512, 1024, 2048, 4096, 8192)]
SIZES += [(512, 1376), (1024, 2736), (2048, 5461)]
LARGE = 4096  # decomposed once; smaller ones three times
MODELS = ["60m", "350m", "1.3b"]
TRAINED = ["60m", "350m"]
TINY_SIZES = [(16, 16), (16, 44)]
TINY_MODELS = TINY_TRAINED = ["tiny"]

MEASURED = [
    *("AdaDiag", "AdaDiag, eigh", "AdaDiag++", "AdaDiag++, eigh"),
    *("AdafacDiag", "HfacDiag"),
]
FIGURES = {
    "decompositions": ["ms", "orthogonality"],
    "steps": ["step_ms", "longest_ms", "state_bytes", "peak_bytes"],
    "training": ["step_ms", "optimizer_ms", "share", "longest_ms", "peak_bytes"],
}


def attempted(measure: Callable[[], Row]) -> Row:
    """The figures, or a note of why there are none."""
    try:
        return measure()
    except ImportError as error:
        note = f"{error.name} is not installed"
    except torch.OutOfMemoryError:
        note = "does not fit in memory"
    except torch.linalg.LinAlgError:
        note = "did not converge"
    return {"note": note}


def rows_of(part: str, tasks: list[Task]) -> list[Row]:
    """Carries out tasks; each row has all figures of the part, None without one."""
    rows = []
    for named, measure in tqdm(tasks, desc=part, unit="row"):
        missing = dict.fromkeys([*FIGURES[part], "note"])
        rows.append(named | missing | attempted(measure))
        gc.collect()  # the next one has the whole memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


# ---------------------------------------------------------------- decompositions


def ours(grad: Tensor, **options: str) -> Decomposition:
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    groups = [{"params": [weight], "rotate": True}]
    optimizer = AdaDiag(groups, lr=LR, refresh_every=1, **options)
    weight.grad = torch.zeros_like(grad)
    optimizer.step()  # plans, and makes no basis of zeros
    weight.grad = grad

    def decompose() -> list[Tensor]:
        optimizer.step()
        state = optimizer.state[weight]
        return [state[key] for key in state if key.startswith("rotation")]

    return decompose


def decompositions(
    device: torch.device,
) -> dict[str, Callable[[Tensor], Decomposition]]:
    """Methods by name; each is given the matrix before the time is taken."""

    def svd(grad: Tensor, driver: str | None = None) -> Decomposition:
        return lambda: [torch.linalg.svd(grad, full_matrices=False, driver=driver).U]

    found: dict[str, Callable[[Tensor], Decomposition]] = {
        "torch svd": svd,
        "torch eigh of G G^T": lambda grad: (
            lambda: [torch.linalg.eigh(grad @ grad.mT)[1]]
        ),
        "torch qr of G^T": lambda grad: lambda: [torch.linalg.qr(grad.mT).Q],
    }
    if device.type == "cuda":  # cuSOLVER has several, of which torch takes gesvdj first
        for driver in ("gesvdj", "gesvd"):
            found[f"torch svd, {driver}"] = functools.partial(svd, driver=driver)
    for sides in ("one", "two"):
        for basis in ("svd", "eigh"):
            name = f"AdaDiag, {basis}, {sides} side{'s' * (sides == 'two')}"
            found[name] = functools.partial(ours, basis=basis, sides=sides)
    return found


def error_of(vectors: Tensor) -> float:
    """How far columns are from orthonormal."""
    gram = vectors.mT @ vectors
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())


def decomposed(
    method: Callable[[Tensor], Decomposition],
    shape: tuple[int, int],
    args: argparse.Namespace,
) -> Row:
    generator = torch.Generator(args.device).manual_seed(args.seed)
    grad = torch.randn(shape, device=args.device, generator=generator)
    method(grad[:64, :64].contiguous())()  # loads the libraries
    decompose = method(grad)
    made: list[Tensor] = []

    def once() -> None:
        made[:] = decompose()

    repeats = 1 if min(shape) >= LARGE else 3
    clock = CLOCKS[args.clock]
    times = [timed(once, grad.device, clock) for _ in range(repeats)]
    return {
        "ms": statistics.median(times),
        "orthogonality": max(map(error_of, made)),
    }


def decomposition_tasks(args: argparse.Namespace) -> list[Task]:
    methods = decompositions(torch.device(args.device))
    return [
        (
            {"size": f"{shape[0]} x {shape[1]}", "method": name},
            functools.partial(decomposed, method, shape, args),
        )
        for shape in (TINY_SIZES if args.tiny else SIZES)
        for name, method in methods.items()
    ]


# ---------------------------------------------------------------- steps


def hidden_shapes(preset: Preset) -> list[tuple[int, int]]:
    hidden, ffn = preset.hidden, preset.ffn
    layer = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    return layer * preset.layers


def allocated(device: torch.device) -> int:
    """Bytes of all tensors; the peak is counted from here on."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(before: int, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) - before


def summary(times: dict[int, float], every: int) -> Row:
    """Milliseconds of an ordinary step and of the longest one around a refresh."""
    ordinary = [t for step, t in times.items() if is_ordinary(step, every)]
    others = [t for step, t in times.items() if not is_ordinary(step, every)]
    return {"step_ms": statistics.median(ordinary), "longest_ms": max(others)}


def stepped(name: str, model: str, args: argparse.Namespace) -> Row:
    """One optimizer alone in memory, with fresh gradients in every step."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(args.seed)
    shapes = hidden_shapes(PRESETS[model])
    weights, fresh = (Matrices(shapes, device) for _ in range(2))
    weights.normal_(generator, 0.02)
    fresh.normal_(generator, 1.0)
    entries, missing = contestants([name], weights, fresh, args.refresh_every)
    if missing:
        return {"note": "not installed"}
    del weights
    (entry,) = entries
    entry.give(fresh)
    before = allocated(device)
    times = {}
    for step in range(1, args.warmup + args.rounds + 1):
        fresh.normal_(generator, 1.0)
        entry.give(fresh)
        elapsed = timed(entry.optimizer.step, device, CLOCKS[args.clock])
        if step > args.warmup:
            times[step] = elapsed
    if not all(torch.isfinite(param).all() for param in entry.params):
        raise RuntimeError(f"{name}: weights are no longer finite")
    figures = summary(times, args.refresh_every)
    figures["state_bytes"] = state_bytes(entry.optimizer)
    return figures | {"peak_bytes": peak_since(before, device)}


def step_tasks(args: argparse.Namespace) -> list[Task]:
    return [
        (
            {"model": model, "optimizer": name},
            functools.partial(stepped, name, model, args),
        )
        for model in (TINY_MODELS if args.tiny else MODELS)
        for name in [*MEASURED, *PEERS]
    ]


# ---------------------------------------------------------------- training


def optimizer_for(name: str, model: torch.nn.Module, every: int) -> Any:
    if name == "AdaDiag":
        return AdaDiag(param_groups(model), lr=LR, refresh_every=every)
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)


def trained(preset: str, name: str, args: argparse.Namespace) -> Row:
    """Training steps of a whole model on random tokens."""
    device = torch.device(args.device)
    run = types.SimpleNamespace(**asdict(PRESETS[preset]), seed=args.seed)
    before = allocated(device)
    model = build_model(run).to(device)
    optimizer = optimizer_for(name, model, args.refresh_every)
    generator = torch.Generator(device).manual_seed(args.seed)
    size = run.micro_batch, run.sequence + 1
    clock, low = CLOCKS[args.clock], device.type == "cuda"

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = token_loss(model, tokens, reduction="mean")
        loss.backward()

    whole, own = {}, []
    for step in range(1, args.warmup + args.rounds + 1):
        tokens = torch.randint(run.vocab, size, device=device, generator=generator)
        rest = timed(forward_and_backward, device, clock)
        elapsed = timed(optimizer.step, device, clock)
        if step > args.warmup:
            whole[step] = rest + elapsed
            own += [elapsed] if is_ordinary(step, args.refresh_every) else []
    if not all(torch.isfinite(param).all() for param in model.parameters()):
        raise RuntimeError(f"{name}: weights are no longer finite")
    figures = summary(whole, args.refresh_every)
    figures["optimizer_ms"] = statistics.median(own)
    figures["share"] = figures["optimizer_ms"] / figures["step_ms"]
    return figures | {"peak_bytes": peak_since(before, device)}


def training_tasks(args: argparse.Namespace) -> list[Task]:
    return [
        (
            {"model": preset, "optimizer": name},
            functools.partial(trained, preset, name, args),
        )
        for preset in (TINY_TRAINED if args.tiny else TRAINED)
        for name in ("torch AdamW, fused", "AdaDiag")
    ]


# ---------------------------------------------------------------- the command

PARTS: dict[str, Callable[[argparse.Namespace], list[Task]]] = {
    "decompositions": decomposition_tasks,
    "steps": step_tasks,
    "training": training_tasks,
}


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def table(part: str, rows: list[Row]) -> str:
    heads = list(rows[0])
    lines = [f"### {part.capitalize()}", "", f"| {' | '.join(heads)} |"]
    lines += ["|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(cell(row[head]) for head in heads)} |" for row in rows]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    args = parser.parse_args(argv)
    # Steps 4 to 12: six ordinary ones, and the second refresh.
    args.warmup, args.rounds, args.refresh_every = 3, 9, 10
    args.seed, args.clock = 0, "wall"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found: Row = {"machine": machine(args), "device": args.device, "tiny": args.tiny}
    page = [found["machine"]]
    print(page[0], flush=True)
    for part in args.parts:
        found[part] = rows_of(part, PARTS[part](args))
        page.append(table(part, found[part]))
        print(f"\n{page[-1]}", flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
            (args.out / "gpu.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
