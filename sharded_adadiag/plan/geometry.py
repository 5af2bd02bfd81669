"""Regions and layouts: which part of a full matrix each rank holds."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from sharded_adadiag.plan.regions import (
    Box,
    FlatRange,
    Region,
    full,
    intersect,
    shared_regions,
)

# Ascending ranks. A `range` wherever they are evenly spaced, so that equal ranks
# compare equal and 4,096 replicas take no more room than two.
Ranks = Sequence[int]
Pieces = tuple[tuple[Region, Ranks], ...]
# So many pieces are looked through faster than put in order.
FEW = 16

EMPTY = Box(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where the entries of a matrix are, with room only for ranks that hold some.

    Attributes:
        world_size: Number of ranks.
        pieces: The distinct non-empty regions, each with the ranks that hold it, in
            the order of their first rank. A rank holds at most one.
        rest: The empty region of every other rank. Its shape tells how many rows or
            columns such a rank still takes part in sums of.
    """

    world_size: int
    pieces: Pieces
    rest: Region = EMPTY

    @classmethod
    def of(cls, regions: Iterable[Region]) -> Layout:
        """The layout with these regions, by rank."""
        ranks: dict[Region, list[int]] = {}
        rest: Region | None = None
        count = 0
        for count, region in enumerate(regions, 1):
            if region.numel:
                ranks.setdefault(region, []).append(count - 1)
            else:
                rest = region if rest is None else rest
        pieces = tuple((region, ranks_of(some)) for region, some in ranks.items())
        return cls(count, pieces, EMPTY if rest is None else rest)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Layout) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __len__(self) -> int:
        return self.world_size

    def __getitem__(self, rank: int) -> Region:
        if not 0 <= rank < self.world_size:
            raise IndexError(rank)  # ends iteration
        return self._found(rank)[0]

    def __iter__(self) -> Iterator[Region]:
        return (self[rank] for rank in range(self.world_size))

    @cached_property
    def numel(self) -> int:
        """Entries that all ranks hold together, replicas counted each time."""
        return sum(region.numel * len(ranks) for region, ranks in self.pieces)

    @cached_property
    def copies(self) -> int:
        """The most ranks that hold one piece."""
        return max((len(ranks) for _, ranks in self.pieces), default=1)

    def is_everywhere(self) -> bool:
        """Whether every rank holds the same region."""
        return len(self.pieces) == 1 and len(self.pieces[0][1]) == self.world_size

    def holders(self, rank: int) -> Ranks:
        """The ranks that hold what a rank holds; none if that is nothing."""
        return self._found(rank)[1]

    def overlapping(
        self, wanted: Region, cols: int
    ) -> Iterator[tuple[Region, Region, Ranks]]:
        """The pieces that share entries with a region.

        Args:
            wanted: A region of the matrix.
            cols: Columns of the matrix.

        Yields:
            A piece, a region that it shares with the one wanted, and who holds the
            piece; up to three times for one piece (see `shared_regions`).
        """
        if not wanted.numel:
            return
        pieces = self.pieces
        if len(pieces) > FEW:
            axis, pieces, starts, stops = self._sorted
            if axis:
                low, high = _extent(wanted, axis, cols)
                first = bisect.bisect_right(stops, low)
                last = bisect.bisect_left(starts, high)
                pieces = pieces[first:last]
        if isinstance(wanted, Box):
            pieces = _near(pieces, wanted)
        for piece, ranks in pieces:
            for shared in shared_regions(piece, wanted, cols):
                yield piece, shared, ranks

    def _found(self, rank: int) -> tuple[Region, Ranks]:
        """The region of a rank and all ranks that hold it; none if it is empty."""
        if len(self.pieces) > FEW:
            return self._place.get(rank, (self.rest, ()))
        for piece in self.pieces:
            if rank in piece[1]:
                return piece
        return self.rest, ()

    @cached_property
    def _key(self) -> tuple[object, ...]:
        return self.world_size, self.pieces, self.rest

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    @cached_property
    def _place(self) -> dict[int, tuple[Region, Ranks]]:
        return {rank: piece for piece in self.pieces for rank in piece[1]}

    @cached_property
    def _sorted(self) -> tuple[str, Pieces, list[int], list[int]]:
        """The axis along which the pieces lie, they, their starts and ends along it.

        The axis is "" if they lie along none.
        """
        axis = _axis([region for region, _ in self.pieces])
        if not axis:
            return "", self.pieces, [], []
        ordered = tuple(sorted(self.pieces, key=lambda piece: piece[0]))
        extents = [_extent(piece, axis, 1) for piece, _ in ordered]
        return axis, ordered, [a for a, _ in extents], [b for _, b in extents]


@functools.lru_cache(maxsize=8192)
def alone(rank: int) -> Ranks:
    """The ranks that are only this one, kept once for the many blocks it works on."""
    return range(rank, rank + 1)


def _near(pieces: Pieces, wanted: Box) -> Pieces:
    """The pieces that may share entries with a box: many do not, seen here at once."""
    top, bottom, left, right = wanted
    return tuple([
        piece
        for piece in pieces
        if not isinstance(piece[0], Box)
        or (
            piece[0][0] < bottom
            and piece[0][1] > top
            and piece[0][2] < right
            and piece[0][3] > left
        )
    ])


def ranks_of(ranks: Sequence[int]) -> Ranks:
    """Ascending ranks as a range if they are evenly spaced."""
    if len(ranks) == 1:
        return alone(ranks[0])
    step = ranks[1] - ranks[0]
    even = range(ranks[0], ranks[-1] + 1, step)
    return even if list(even) == list(ranks) else tuple(ranks)


def _axis(regions: Sequence[Region]) -> str:
    """Along what the regions lie: "flat", "rows", "cols", or "" for neither."""
    if all(isinstance(region, FlatRange) for region in regions):
        return "flat"
    boxes = [region for region in regions if isinstance(region, Box)]
    if len(boxes) < len(regions):
        return ""
    if len({(box.col_start, box.col_stop) for box in boxes}) == 1:
        return "rows"
    if len({(box.row_start, box.row_stop) for box in boxes}) == 1:
        return "cols"
    return ""


def _extent(region: Region, axis: str, cols: int) -> tuple[int, int]:
    """First and last coordinate of a region along an axis of a matrix, exclusive."""
    if axis == "flat":
        if isinstance(region, FlatRange):
            return region.start, region.stop
        last_row = (region.row_stop - 1) * cols
        return region.row_start * cols + region.col_start, last_row + region.col_stop
    if isinstance(region, FlatRange):
        whole = axis == "cols"
        return (0, cols) if whole else (region.start // cols, -(-region.stop // cols))
    if axis == "rows":
        return region.row_start, region.row_stop
    return region.col_start, region.col_stop


def on_team(team: Ranks, rows: int, cols: int, world_size: int) -> Layout:
    """The layout in which each rank of a team holds everything."""
    if rows * cols == 0:
        return Layout(world_size, ())
    return Layout(world_size, ((full(rows, cols), team),))


@functools.lru_cache(maxsize=64)
def everywhere(rows: int, cols: int, world_size: int) -> Layout:
    """The layout in which every rank holds everything."""
    if rows * cols == 0:
        return Layout(world_size, (), full(rows, cols))
    return Layout(world_size, ((full(rows, cols), range(world_size)),))


def only_on(rank: int, rows: int, cols: int, world_size: int) -> Layout:
    """The layout in which one rank holds everything."""
    return on_team(alone(rank), rows, cols, world_size)


@functools.lru_cache(maxsize=1024)
def cut_rows(layout: Layout, top: int, bottom: int, cols: int) -> Layout:
    """What a layout is of some of the rows of its matrix.

    Args:
        layout: Where the entries of the whole matrix are.
        top: The first row.
        bottom: The first row behind them.
        cols: Columns of the matrix.

    Returns:
        The layout of the matrix that these rows are.
    """
    pieces = []
    for region, ranks in layout.pieces:
        some: Region
        if isinstance(region, FlatRange):
            start, stop = max(region.start, top * cols), min(region.stop, bottom * cols)
            some = FlatRange(start - top * cols, stop - top * cols)
            held = start < stop
        else:
            first, last = max(region.row_start, top), min(region.row_stop, bottom)
            some = Box(first - top, last - top, region.col_start, region.col_stop)
            held = first < last
        if held:
            pieces.append((some, ranks))
    return Layout(layout.world_size, tuple(pieces), layout.rest)


@functools.lru_cache(maxsize=1024)
def reshaped(layout: Layout, width: int, cols: int) -> Layout | None:
    """A layout of the same entries in rows of another length.

    Args:
        layout: What each rank holds.
        width: Columns of the view in which that is given.
        cols: Columns of the wanted view.

    Returns:
        Boxes if all regions are whole rows there, else flat ranges; None if a region
        does not lie in one stretch.
    """
    ranges = []
    for region, ranks in layout.pieces:
        if isinstance(region, Box):
            if region.shape[0] > 1 and region.shape[1] != width:
                return None
            start = region.row_start * width + region.col_start
            region = FlatRange(start, start + region.numel)
        ranges.append((region, ranks))
    pieces: Pieces = tuple(ranges)
    if all(start % cols == stop % cols == 0 for (start, stop), _ in ranges):
        pieces = tuple(
            (Box(start // cols, stop // cols, 0, cols), ranks)
            for (start, stop), ranks in ranges
        )
    return Layout(layout.world_size, pieces)


def tiling_error(layout: Layout, rows: int, cols: int) -> str | None:
    """Why the pieces of a layout do not tile a matrix, or None if they do.

    Args:
        layout: Where the matrix's entries are.
        rows: Number of rows of the matrix.
        cols: Number of columns of the matrix.

    Returns:
        A sentence for an error message, or None.
    """
    pieces = [region for region, _ in layout.pieces]
    covered = sum(piece.numel for piece in pieces)
    if covered != rows * cols:
        return f"its pieces hold {covered} entries of {rows * cols}"
    whole = full(rows, cols)
    # In the order of their first rows only those that reach down to the next
    # piece's can clash with it.
    near: list[Region] = []
    for piece in sorted(pieces, key=lambda piece: _extent(piece, "rows", cols)):
        try:
            if intersect(piece, whole, cols) != piece:
                return f"{piece} is not inside the {rows} x {cols} matrix"
            top = _extent(piece, "rows", cols)[0]
            near = [p for p in near if _extent(p, "rows", cols)[1] > top]
            clash = next((p for p in near if intersect(piece, p, cols)), None)
        except ValueError as error:
            return str(error)
        if clash is not None:
            return f"{piece} and {clash} overlap"
        near.append(piece)
    return None
