"""Regions: which part of a full matrix a rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Box:
    """The rectangle ``[row_start:row_stop, col_start:col_stop]``; may be empty."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the rectangle."""
        return self.row_stop - self.row_start, self.col_stop - self.col_start

    @property
    def numel(self) -> int:
        """Entries in it."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class FlatRange:
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


Region = Box | FlatRange
# The region of each rank of the group, in rank order.
Layout = tuple[Region, ...]

EMPTY = Box(0, 0, 0, 0)


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
        box = Box(
            max(a.row_start, b.row_start),
            min(a.row_stop, b.row_stop),
            max(a.col_start, b.col_start),
            min(a.col_stop, b.col_stop),
        )
        return box if min(box.shape) > 0 else None
    if a.numel == 0 or b.numel == 0:
        return None
    x, y = as_flat(a, cols), as_flat(b, cols)
    flat = FlatRange(max(x.start, y.start), min(x.stop, y.stop))
    return flat if flat.numel > 0 else None


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


def even_blocks(rows: int, cols: int, parts: int, *, by_rows: bool) -> Layout:
    """Row or column blocks whose sizes differ by at most one.

    Args:
        rows: Of the matrix.
        cols: Of the matrix.
        parts: Number of blocks; some are empty if there are more than lines.
        by_rows: Row blocks rather than column blocks.

    Returns:
        The block of each part.
    """
    length = rows if by_rows else cols
    cuts = [length * i // parts for i in range(parts + 1)]
    pairs = list(zip(cuts, cuts[1:]))
    if by_rows:
        return tuple(Box(a, b, 0, cols) for a, b in pairs)
    return tuple(Box(0, rows, a, b) for a, b in pairs)


def spread(layout: Layout, rows: int, cols: int, *, by_rows: bool) -> Layout:
    """Every piece divided among the ranks that hold it.

    A rank without entries still takes part in sums along the dimension that is not
    divided, so its empty block gets the full length there.

    Args:
        layout: Blocks of whole rows, or of whole columns; empty ones of any shape.
        rows: Of the matrix.
        cols: Of the matrix.
        by_rows: They are row blocks rather than column blocks.

    Returns:
        A layout without replicas; a piece that only one rank holds stays whole.
    """
    side, length = (1, cols) if by_rows else (0, rows)
    nothing = Box(0, 0, 0, cols) if by_rows else Box(0, rows, 0, 0)
    result: list[Region] = [
        region if isinstance(region, Box) and region.shape[side] == length else nothing
        for region in layout
    ]
    for piece, ranks in holders(layout).items():
        assert isinstance(piece, Box)
        blocks = even_blocks(*piece.shape, len(ranks), by_rows=by_rows)
        for rank, block in zip(ranks, blocks):
            assert isinstance(block, Box)
            result[rank] = Box(
                piece.row_start + block.row_start,
                piece.row_start + block.row_stop,
                piece.col_start + block.col_start,
                piece.col_start + block.col_stop,
            )
    return tuple(result)


def holders(layout: Layout) -> dict[Region, list[int]]:
    """The distinct non-empty pieces of a layout and the ranks that hold each."""
    pieces: dict[Region, list[int]] = {}
    for rank, region in enumerate(layout):
        if region.numel:
            pieces.setdefault(region, []).append(rank)
    return pieces


def tiling_error(pieces: Sequence[Region], rows: int, cols: int) -> str | None:
    """Why distinct pieces do not tile a matrix, or None if they do.

    Args:
        pieces: Distinct, non-empty regions.
        rows: Of the matrix.
        cols: Of the matrix.

    Returns:
        A sentence for an error message, or None.
    """
    covered = sum(piece.numel for piece in pieces)
    if covered != rows * cols:
        return f"its pieces hold {covered} entries of {rows * cols}"
    whole = full(rows, cols)
    for i, piece in enumerate(pieces):
        try:
            if intersect(piece, whole, cols) != piece:
                return f"{piece} is not inside the {rows} x {cols} matrix"
            clash = next(
                (p for p in pieces[:i] if intersect(piece, p, cols) is not None), None
            )
        except ValueError as error:
            return str(error)
        if clash is not None:
            return f"{piece} and {clash} overlap"
    return None
