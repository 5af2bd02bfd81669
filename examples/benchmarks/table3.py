"""The paper's table of optimizer memory, from the states this package keeps.

    python examples/benchmarks/table3.py

Each optimizer is built on meta tensors of the shapes of a LLaMA and asked for the bytes
of its state; nothing is allocated. The paper counts two bytes per element (bfloat16),
leaves out the gains of the norms, and its G is 1024 x 1000 x 1000 bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag

UNIT = 1.024e9  # bytes; decimal GB fails 26 of the 36 cells, GiB 34
VOCABULARY = 32000


@dataclasses.dataclass(frozen=True)
class Llama:
    """The shapes of a LLaMA with an untied head."""

    hidden: int
    ffn: int
    layers: int

    def groups(self) -> list[dict[str, Any]]:
        """Its matrices as param groups: the hidden layers; embedding and head."""
        h, f = self.hidden, self.ffn
        layer = [(h, h)] * 4 + [(f, h), (f, h), (h, f)]
        return [
            {"params": [_meta(shape) for shape in layer * self.layers], "rotate": True},
            {"params": [_meta((VOCABULARY, h)) for _ in range(2)], "rotate": False},
        ]


def _meta(shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))


SIZES = {
    "60M": Llama(512, 1376, 8),
    "130M": Llama(768, 2048, 12),
    "350M": Llama(1024, 2736, 24),
    "1.3B": Llama(2048, 5461, 24),
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (AdaDiag, {"sides": "none"}),
    "AdaDiag": (AdaDiag, {"sides": "one"}),
    "AdaDiag++": (AdaDiag, {"sides": "two"}),
    "Adafactor with momentum": (AdafacDiag, {"sides": "none", "momentum": True}),
    "Adafactor": (AdafacDiag, {"sides": "none", "momentum": False}),
    "AdafacDiag with momentum": (AdafacDiag, {"sides": "one", "momentum": True}),
    "AdafacDiag": (AdafacDiag, {"sides": "one", "momentum": False}),
    "Hfac": (HfacDiag, {"sides": "none"}),
    "HfacDiag": (HfacDiag, {"sides": "one"}),
}
PRINTED = {
    "Adam": ("0.23", "0.52", "1.44", "5.23"),
    "AdaDiag": ("0.26", "0.62", "1.78", "6.61"),
    "AdaDiag++": ("0.36", "0.97", "3.03", "11.59"),
    "Adafactor with momentum": ("0.18", "0.36", "0.85", "2.87"),
    "Adafactor": ("0.06", "0.10", "0.13", "0.26"),
    "AdafacDiag with momentum": ("0.21", "0.45", "1.19", "4.25"),
    "AdafacDiag": ("0.09", "0.19", "0.47", "1.63"),
    "Hfac": ("0.13", "0.19", "0.26", "0.52"),
    "HfacDiag": ("0.16", "0.29", "0.60", "1.89"),
}


def state_bytes(method: str, size: str) -> int:
    """Bytes of the state of one cell, step counters included (four each)."""
    optimizer, options = METHODS[method]
    return optimizer(SIZES[size].groups(), **options).state_bytes()


def main() -> None:
    print("| optimizer, computed (printed) | " + " | ".join(SIZES) + " |")
    print("|---" + "|---:" * len(SIZES) + "|")
    equal = 0
    for method, row in PRINTED.items():
        cells = []
        for size, printed in zip(SIZES, row, strict=True):
            value = state_bytes(method, size) / UNIT
            equal += f"{value:.2f}" == printed
            cells.append(f"{value:.5f} ({printed})")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{equal} of {len(METHODS) * len(SIZES)} cells equal the printed ones.")


if __name__ == "__main__":
    main()
