"""The table of hard cases that every distributed test goes through."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One parameter of a test model.

    Attributes:
        name: The parameter's name, which says why the case is hard.
        shape: Its logical shape.
        rotate: Whether its group is rotated.
        frozen: It requires no gradient.
        without_gradient: It requires one and never gets one.
    """

    name: str
    shape: tuple[int, ...]
    rotate: bool = True
    frozen: bool = False
    without_gradient: bool = False


HARD_CASES = (
    Case("square", (16, 16)),
    Case("tall", (23, 7)),
    Case("wide", (7, 23)),
    Case("wide_twin", (7, 23)),
    Case("uneven_rows", (10, 6)),
    Case("empty_shard", (3, 6)),
    Case("one_row", (1, 9)),
    Case("one_column", (9, 1)),
    Case("one_entry", (1, 1)),
    Case("convolution", (6, 2, 3, 3)),
    Case("vector", (11,)),
    Case("embedding", (13, 5), rotate=False),
    Case("frozen", (4, 4), frozen=True),
    Case("without_gradient", (5, 8), without_gradient=True),
)
ONE_PARAMETER = (Case("alone", (12, 8)),)


def weights(cases: tuple[Case, ...], dtype: torch.dtype) -> list[Tensor]:
    """The same initial full weights on every rank.

    Args:
        cases: The parameters.
        dtype: Dtype of the weights.

    Returns:
        One tensor for each.
    """
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(c.shape, generator=generator, dtype=torch.float64).to(dtype)
        for c in cases
    ]


def gradients(cases: tuple[Case, ...], step: int, dtype: torch.dtype) -> list[Tensor]:
    """The same full-rank gradients of one step on every rank.

    Args:
        cases: The parameters.
        step: Counted from 0.
        dtype: Dtype of the gradients.

    Returns:
        One tensor for each.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        0.1 * torch.randn(c.shape, generator=generator, dtype=torch.float64).to(dtype)
        for c in cases
    ]
