"""Regions: parts of a full matrix, and what two of them share."""

from __future__ import annotations

from typing import NamedTuple


class Box(NamedTuple):
    """The rectangle ``[row_start:row_stop, col_start:col_stop]``; may be empty."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the rectangle."""
        top, bottom, left, right = self
        return bottom - top, right - left

    @property
    def numel(self) -> int:
        """Entries in it."""
        top, bottom, left, right = self
        return (bottom - top) * (right - left)


class FlatRange(NamedTuple):
    """Entries ``[start:stop]`` of the matrix in row-major order; may be empty."""

    start: int
    stop: int

    @property
    def shape(self) -> tuple[int]:
        """Length of the range."""
        return (self.stop - self.start,)

    @property
    def numel(self) -> int:
        """Entries in it."""
        return self.stop - self.start


# Tuples, because a plan for thousands of ranks makes a million of them.
Region = Box | FlatRange


def full(rows: int, cols: int) -> Box:
    """The region that is the whole matrix."""
    return Box(0, rows, 0, cols)


def intersect(a: Region, b: Region, cols: int) -> Region | None:
    """What two regions share.

    Args:
        a: A region.
        b: Another region of the same matrix.
        cols: Columns of the matrix.

    Returns:
        The shared region, or None if it is empty. A flat range and a box share a
        region only if the box is made of whole rows (see `as_flat`).
    """
    if isinstance(a, Box) and isinstance(b, Box):
        return _common_box(a, b)
    if a.numel == 0 or b.numel == 0:
        return None
    x, y = as_flat(a, cols), as_flat(b, cols)
    flat = FlatRange(max(x.start, y.start), min(x.stop, y.stop))
    return flat if flat.numel > 0 else None


def _common_box(a: Box, b: Box) -> Box | None:
    top, bottom, left, right = a
    first, last, begin, end = b
    # Comparisons, for `max` and `min` take most of the time of a plan otherwise.
    top, bottom = top if top > first else first, bottom if bottom < last else last
    left, right = left if left > begin else begin, right if right < end else end
    return Box(top, bottom, left, right) if top < bottom and left < right else None


def shared_regions(a: Region, b: Region, cols: int) -> tuple[Region, ...]:
    """What two regions share, as few regions as can say it.

    A flat range shares with a box that is not made of whole rows up to three boxes:
    a part of the first row, whole rows of the box, a part of the last row.

    Args:
        a: A region.
        b: Another region of the same matrix.
        cols: Columns of the matrix.

    Returns:
        Disjoint regions in row-major order, none empty; the same for b and a.
    """
    if isinstance(a, Box):
        if isinstance(b, Box):
            box = _common_box(a, b)
            return () if box is None else (box,)
        a, b = b, a
    if isinstance(b, Box) and b.shape[1] != cols:
        return _boxes_of(a, b, cols)
    shared = intersect(a, b, cols)
    return () if shared is None else (shared,)


def _boxes_of(flat: FlatRange, box: Box, cols: int) -> tuple[Box, ...]:
    """The boxes that a flat range shares with a box of some of the columns."""
    if not (flat.numel and box.numel):
        return ()
    left, right = box.col_start, box.col_stop
    first, start = divmod(flat.start, cols)
    last, stop = divmod(flat.stop, cols)
    if first == last:
        parts = [Box(first, first + 1, max(left, start), min(right, stop))]
    else:
        # A row of the box may be whole although the range has only a part of it.
        top = first if start <= left else first + 1
        bottom = last + 1 if stop >= right else last
        parts = [
            Box(first, top, max(left, start), right),
            Box(top, bottom, left, right),
            Box(bottom, last + 1, left, min(right, stop)),
        ]
    inside = (_common_box(part, box) for part in parts)
    return tuple(part for part in inside if part is not None)


def entries_above(region: Region, row: int, cols: int) -> int:
    """How many entries of a region lie above a row of its matrix.

    Args:
        region: The region.
        row: The row.
        cols: Columns of the matrix.

    Returns:
        Their number. What lies at and below the row comes after them in a piece.
    """
    if isinstance(region, FlatRange):
        return min(max(row * cols - region.start, 0), region.numel)
    above = min(max(row - region.row_start, 0), region.shape[0])
    return above * region.shape[1]


def as_flat(region: Region, cols: int) -> FlatRange:
    """A region as a flat range.

    Args:
        region: A flat range, or a box of whole rows.
        cols: Columns of the matrix.

    Returns:
        The same entries.

    Raises:
        ValueError: If the box is not made of whole rows.
    """
    if isinstance(region, FlatRange):
        return region
    if region.numel and region.shape[1] != cols:
        raise ValueError(f"{region} of a matrix of {cols} columns is no flat range")
    return FlatRange(region.row_start * cols, region.row_stop * cols)
