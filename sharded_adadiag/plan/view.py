"""How a tensor is seen as matrices: the one place that says so.

A tensor is one matrix, its first dimension by all the others. With ``batch_dims`` its
leading dimensions count matrices: it is a stack of them. With ``split_rows`` its rows
are cut into matrices. All matrices of a tensor have the same columns and lie one
under the other in its memory, so that seeing them is a reshape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from sharded_adadiag.algorithm.state import Rule, rotated_sides
from sharded_adadiag.options import Options


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixView:
    """The matrices of a tensor.

    Attributes:
        heights: Rows of each matrix.
        cols: Columns of every matrix.
        batch: The dimensions that count the matrices of a stack; empty if it is none.
    """

    heights: tuple[int, ...]
    cols: int
    batch: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        batch_dims: int = 0,
        split_rows: Sequence[int] | None = None,
    ) -> MatrixView:
        """The view of a tensor; a vector or a scalar is one row.

        Args:
            shape: The shape of the full parameter.
            batch_dims: Leading dimensions that count matrices.
            split_rows: Rows of each matrix.

        Returns:
            The view.

        Raises:
            ValueError: If the shape does not allow it, with the rule and the remedy.
        """
        split = None if split_rows is None else tuple(split_rows)
        return _view(tuple(shape), batch_dims, split)

    @classmethod
    def with_options(cls, shape: Sequence[int], options: Options) -> MatrixView:
        """The view of a tensor in a group with these options."""
        return cls.of(shape, options.batch_dims, options.split_rows)

    @property
    def rows(self) -> int:
        """Rows of all matrices."""
        return sum(self.heights)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the view in which layouts are given.

        Every matrix of a stack is a row, so that both a part of the matrices and a
        part of the rows of each are a box.
        """
        if self.batch:
            return len(self.heights), math.prod(self.heights[:1]) * self.cols
        return self.rows, self.cols

    def is_rotated(self, rule: Rule, options: Options) -> bool:
        """Whether any of the matrices is rotated, or must be whole all the same."""
        if not options.rotate or self.rows * self.cols == 0:
            return False
        if options.sides == "none":
            return rule.factored
        shapes = {(height, self.cols) for height in self.heights}
        return any(any(rotated_sides(shape, options)) for shape in shapes)


@functools.lru_cache(maxsize=256)
def _view(
    shape: tuple[int, ...], batch_dims: int, split: tuple[int, ...] | None
) -> MatrixView:
    if len(shape) < 2:
        return MatrixView((1,), math.prod(shape))
    if batch_dims and len(shape) > 2:
        if split is not None:
            raise ValueError(
                f"batch_dims={batch_dims} and split_rows={list(split)} are both set "
                f"for a tensor of shape {shape}; a group may have one of them"
            )
        if batch_dims > len(shape) - 2:
            raise ValueError(
                f"invalid batch_dims: got {batch_dims} for a tensor of shape {shape}, "
                f"it must leave two dimensions (at most {len(shape) - 2}); put the "
                "parameter into a group without it"
            )
        batch, (height, *rest) = shape[:batch_dims], shape[batch_dims:]
        return MatrixView((height,) * math.prod(batch), math.prod(rest), batch)
    if split is None:
        return MatrixView(shape[:1], math.prod(shape[1:]))
    if sum(split) != shape[0]:
        raise ValueError(
            f"invalid split_rows: got {list(split)} for a tensor of shape {shape}, "
            f"its sum must be the number of rows, {shape[0]}; put parameters of other "
            "shapes into a group without it"
        )
    return MatrixView(split, math.prod(shape[1:]))


def needs_matrix(rule: Rule, shape: Sequence[int], options: Options) -> bool:
    """Whether a parameter must be seen as whole matrices.

    Args:
        rule: The optimizer.
        shape: The parameter's logical shape.
        options: Its group's.

    Returns:
        False for parameters that get plain Adam where they lie: vectors, groups
        with ``rotate=False``, matrices over ``max_rotated_dim``, and base Adam.
    """
    if len(shape) < 2:
        return False
    return MatrixView.with_options(shape, options).is_rotated(rule, options)


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Which of a parameter's matrices a plan is of.

    Attributes:
        first: Position of the first among them.
        count: How many; more than one are consecutive matrices of a stack.
        top: The first of their rows in the view in which layouts are given.
        kind: ``"all"`` for the only matrix of a parameter, ``"stack"`` for matrices of
            a stack, whose states are kept one after the other in one tensor, or
            ``"block"`` for one of several blocks of rows, whose states have keys of
            their own.
        place: Of a stack, where the states begin in the tensor that a rank keeps:
            how many matrices of the parameter it has before.
    """

    first: int = 0
    count: int = 1
    top: int = 0
    kind: str = "all"
    place: int = 0

    @property
    def suffix(self) -> str:
        """What the keys of the states end in."""
        return f".{self.first}" if self.kind == "block" else ""

    def name(self, parameter: str) -> str:
        """The name of the matrices in reports and messages."""
        if self.kind == "all":
            return parameter
        last = self.first + self.count - 1
        which = f"{self.first}..{last}" if self.count > 1 else f"{self.first}"
        return f"{parameter}[{which}]"
