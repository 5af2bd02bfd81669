"""What is kept of a matrix: one table that allocation, plans and saving read."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor that is kept of a matrix ``[m, n]``.

    Attributes:
        dims: The dimensions of its shape, ``"m"`` or ``"n"`` each.
        kept: By whom and as what. ``"block"``: each rank of the team keeps the part
            that belongs to its block of the matrix, in the moments' dtype, zero at
            first. ``"copy"``: each keeps all of it, in the rotations' dtype, the
            identity at first. ``"head"``: the head of the team alone keeps all of it,
            in the rotations' dtype, zero at first. ``"sum"``: each keeps a summand as
            large as the whole, in that dtype but float32 at least, zero at first.
        power: How it follows a change of basis R: each of its dimensions is multiplied
            by the entries of R to this power. 1 for what is linear in the gradient, 2
            for averages of squares, 0 for what does not follow.
    """

    dims: tuple[str, ...]
    kept: Literal["block", "copy", "head", "sum"] = "block"
    power: int = 0

    def shape(self, block: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what a rank keeps.

        Args:
            block: Rows and columns of the rank's block of the matrix.
            whole: Those of the matrix; zeros on a rank that does not keep all of it.

        Returns:
            A length for each of ``dims``.
        """
        sizes = dict(zip("mn", block if self.kept == "block" else whole))
        return tuple(sizes[dim] for dim in self.dims)

    def dtype(self, moments: torch.dtype, rotations: torch.dtype) -> torch.dtype:
        """The dtype in which it is kept, from those of moments and rotations."""
        if self.kept == "sum":
            return torch.promote_types(rotations, torch.float32)
        return moments if self.kept == "block" else rotations

    def begin(self, value: Tensor) -> None:
        """Give a tensor, or each matrix of a stack of them, its first value."""
        value.zero_()
        if self.kept == "copy":
            value.diagonal(dim1=-2, dim2=-1).fill_(1.0)


# Where a basis is that is in force only later; zeros stand for none.
NEXT_ROTATIONS = "next_rotation_left", "next_rotation_right"
