"""What one rank copies in an exchange, as places in memory, without tensors.

Everything of a copy that does not depend on the step: which entries of this rank's
piece go where in the message, and which bytes that came go where in the new piece.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from sharded_adadiag.plan.regions import Box, FlatRange, Region, as_flat


class Place(NamedTuple):
    """Entries of contiguous memory, as ``Tensor.as_strided`` takes them.

    Attributes:
        size: Shape of the view.
        stride: Strides of the view, in elements.
        offset: Position of the view's first element, from the start of the memory.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Copy(NamedTuple):
    """A region of matrix ``item``, copied from one place to another of equal size.

    Attributes:
        item: Position of the matrix in the exchange.
        region: The entries that are copied.
        source: Where it is, in a piece of the matrix or in a message.
        target: Where it goes, likewise.
    """

    item: int
    region: Region
    source: Place
    target: Place


class Arrival(NamedTuple):
    """How this rank's new piece of one matrix is put together.

    Attributes:
        shape: Shape of the new piece.
        unmoved: The new piece is the old one.
        whole: The copied entries fill the new piece.
        summed: The copies are added up, not put side by side.
        own: What this rank has itself, from its old piece.
        came: What the others send, in rank order, from the bytes received.
    """

    shape: tuple[int, ...]
    unmoved: bool
    whole: bool
    summed: bool
    own: tuple[Copy, ...]
    came: tuple[Copy, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CopyList:
    """All that one rank does in an exchange.

    Attributes:
        sent: Bytes to each rank that gets any, by rank.
        received: Bytes from each rank that sends any, by rank.
        packed: From the old pieces to the bytes sent.
        arrivals: The new piece of each matrix.
    """

    sent: dict[int, int]
    received: dict[int, int]
    packed: tuple[Copy, ...]
    arrivals: tuple[Arrival, ...]


def dense(shape: tuple[int, ...], offset: int = 0) -> Place:
    """Entries of one or two dimensions that lie one after the other.

    Args:
        shape: Their shape.
        offset: Elements before them.

    Returns:
        The place.
    """
    return Place(shape, _strides(shape), offset)


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of contiguous entries, one tuple for the many places that have them."""
    return (*shape[1:], 1)


def inside(held: Region, wanted: Region, cols: int) -> Place:
    """Where a region lies in a contiguous piece that holds it.

    Args:
        held: The region of the piece.
        wanted: A region inside it. Part of the columns may be wanted of a flat range,
            and whole rows of either as a flat range.
        cols: Columns of the full matrix.

    Returns:
        The place.
    """
    if isinstance(wanted, Box):
        if isinstance(held, Box):
            row, col = held.row_start, held.col_start
            width, start = held.shape[1], 0
        else:
            row, col, width, start = 0, 0, cols, held.start
        down, right = wanted.row_start - row, wanted.col_start - col
        strides = _strides((1, width))
        return Place(wanted.shape, strides, down * width + right - start)
    around: FlatRange = as_flat(held, cols)
    return Place(wanted.shape, (1,), wanted.start - around.start)
