"""Milliseconds and accuracy of a basis, ours beside other decompositions.

    python examples/benchmarks/decompositions.py
    python examples/benchmarks/decompositions.py --refresh 60m --shapes

The gradients' singular values fall geometrically from 1 to ``--smallest``, as they do
in training. Frobenius' off-diagonal mass hardly sees the small ones; the largest
correlation between two rotated rows does, and Adam makes all rows alike.
Our lines are whole first steps of one matrix, planning and rotating included.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sharded_adadiag import AdaDiag

LLAMA_60M = [(512, 512)] * 32 + [(1376, 512)] * 16 + [(512, 1376)] * 8
TINY = [(16, 16)] * 2 + [(40, 16), (16, 40)]
REFRESHES = {"60m": LLAMA_60M, "tiny": TINY}


def _step(grads: list[Tensor], **options: str) -> list[dict[str, Tensor]]:
    """The states after a first step, most of whose time goes to bases."""
    weights = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    named = [(f"hidden.{i}", weight) for i, weight in enumerate(weights)]
    opt = AdaDiag(named, lr=0.0, **options)
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    opt.step()
    return [opt.state[weight] for weight in weights]


def _ours(basis: str, **options: str) -> Callable[[Tensor], Tensor]:
    def decompose(grad: Tensor) -> Tensor:
        return _step([grad], basis=basis, **options)[0]["rotation_left"]

    return decompose


def _svd(grad: Tensor) -> Tensor:
    return torch.linalg.svd(grad, full_matrices=False)[0]


def _eigh32(grad: Tensor) -> Tensor:
    return torch.linalg.eigh(grad @ grad.mT).eigenvectors.flip(1)


def _deflated(grad: Tensor) -> Tensor:
    """float32 Gram matrices: what one cannot tell apart gets one of its own."""
    grad = grad / grad.abs().max()
    values, vectors = torch.linalg.eigh(grad @ grad.mT)
    vectors = vectors.flip(1)
    kept = int((values > 1e-2 * values[-1]).sum())
    if kept >= len(values) - 1:
        return vectors
    rest = vectors[:, kept:]
    rest = rest @ _deflated(rest.mT @ grad)
    return torch.cat([vectors[:, :kept], rest], dim=1)


def _svd_of_both(grad: Tensor) -> Tensor:
    return torch.linalg.svd(grad, full_matrices=True)[0]


def _eigh_of_both(grad: Tensor) -> Tensor:
    grad = grad.double()
    torch.linalg.eigh(grad.mT @ grad)
    return torch.linalg.eigh(grad @ grad.mT).eigenvectors.flip(1).float()


METHODS = {
    "svd": _ours("svd", side="left"),
    "eigh": _ours("eigh", side="left"),
    "svd of the whole matrix": _svd,
    "eigh of the float32 Gram matrix": _eigh32,
    "the same, small directions anew": _deflated,
    "two sides, svd": _ours("svd", sides="two"),
    "two sides, eigh": _ours("eigh", sides="two"),
    "two sides, svd of the whole matrix": _svd_of_both,
    "two sides, eigh of both Gram matrices": _eigh_of_both,
}


def gradient(rows: int, cols: int, smallest: float, device: torch.device) -> Tensor:
    """Random singular vectors, values from 1 to ``smallest``; float32."""
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, cols)
    u, v = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator).to(device))[0]
        for n in (rows, cols)
    )
    return (u * torch.logspace(0, torch.tensor(smallest).log10(), rank).to(u)) @ v.mT


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The shortest of several runs after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def accuracy(p: Tensor, grad: Tensor) -> tuple[float, float, float]:
    """Off-diagonal mass, largest correlation of two rows, and of P^T P - I."""
    rows = p.double().mT @ grad.double()
    gram = rows @ rows.mT
    off = gram - torch.diag(gram.diagonal())
    lengths = gram.diagonal().sqrt().clamp_min(1e-300)
    correlation = (off / lengths[:, None] / lengths).abs().max()
    eye = torch.eye(len(p), dtype=torch.float64, device=p.device)
    unit = (p.double().mT @ p.double() - eye).abs().max()
    return float(off.norm() / gram.norm()), float(correlation), float(unit)


def table(args: argparse.Namespace, device: torch.device) -> list[str]:
    """One line for each shape and method."""
    lines = ["| shape | method | ms | off-diagonal | correlation | P^T P - I |"]
    lines.append("|---|---|---|---|---|---|")
    for shape in args.shapes:
        rows, cols = (int(n) for n in shape.split("x"))
        grad = gradient(rows, cols, args.smallest, device)
        for name, method in METHODS.items():
            ms = 1e3 * seconds(lambda m=method, g=grad: m(g), args.repeats, device)
            found = " | ".join(f"{x:.0e}" for x in accuracy(method(grad), grad))
            lines.append(f"| {shape} | {name} | {ms:.1f} | {found} |")
            print(lines[-1], flush=True)
    return lines


def refresh(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Seconds for a first step of all matrices of a model."""
    lines = [f"| first step of all matrices, {args.refresh} | s |", "|---|---|"]
    shapes = REFRESHES[args.refresh]
    grads = {s: gradient(*s, args.smallest, device) for s in set(shapes)}

    all_of_them = [grads[shape] for shape in shapes]
    for sides in ("one", "two"):
        for basis in ("svd", "eigh"):
            options = {"sides": sides, "basis": basis}
            took = seconds(lambda o=options: _step(all_of_them, **o), 1, device)
            lines.append(f"| sides {sides}, {basis} | {took:.2f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["512x512", "512x1376"])
    parser.add_argument("--refresh", choices=REFRESHES)
    parser.add_argument("--smallest", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    lines = [f"{platform.machine()}, torch {torch.__version__}, {device}"]
    lines[0] += f", {torch.get_num_threads()} threads"
    lines += table(args, device) if args.shapes else []
    lines += refresh(args, device) if args.refresh else []
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
