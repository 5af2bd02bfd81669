"""Row and column blocks: how ranks divide a matrix to work on it."""

from __future__ import annotations

import functools

from sharded_adadiag.plan.geometry import Layout, Ranks
from sharded_adadiag.plan.regions import Box, full


@functools.lru_cache(maxsize=64)
def even_blocks(rows: int, cols: int, parts: int, *, by_rows: bool) -> Layout:
    """Row or column blocks whose sizes differ by at most one.

    Args:
        rows: Number of rows of the matrix.
        cols: Number of columns of the matrix.
        parts: Number of blocks; some are empty if there are more than lines.
        by_rows: Row blocks rather than column blocks.

    Returns:
        The block of each part.
    """
    return Layout.of(cut(full(rows, cols), parts, by_rows=by_rows))


@functools.lru_cache(maxsize=64)
def spread(layout: Layout, rows: int, cols: int, *, by_rows: bool) -> Layout:
    """Every piece divided among the ranks that hold it.

    A rank without entries still takes part in sums along the dimension that is not
    divided, so its empty block gets the full length there.

    Args:
        layout: Blocks of whole rows, or of whole columns.
        rows: Number of rows of the matrix.
        cols: Number of columns of the matrix.
        by_rows: They are row blocks rather than column blocks.

    Returns:
        A layout without replicas; a piece that only one rank holds stays whole.
    """
    pieces = []
    for piece, ranks in layout.pieces:
        assert isinstance(piece, Box)
        for rank, block in zip(ranks, cut(piece, len(ranks), by_rows=by_rows)):
            if block.numel:
                pieces.append((rank, block))
    rest = Box(0, 0, 0, cols) if by_rows else Box(0, rows, 0, 0)
    placed = tuple((block, range(rank, rank + 1)) for rank, block in sorted(pieces))
    return Layout(layout.world_size, placed, rest)


@functools.lru_cache(maxsize=1024)
def team_blocks(
    team: Ranks, rows: int, cols: int, world_size: int, *, by_rows: bool
) -> Layout:
    """Even row or column blocks, one for each rank of a team.

    Args:
        team: The ranks, no more than there are lines to divide.
        rows: Number of rows of the matrix.
        cols: Number of columns of the matrix.
        world_size: Number of ranks.
        by_rows: Row blocks rather than column blocks.

    Returns:
        The layout; ranks outside the team hold nothing, not even of a sum.
    """
    assert len(team) <= (rows if by_rows else cols)
    blocks = cut(full(rows, cols), len(team), by_rows=by_rows)
    pieces = zip(blocks, team)
    return Layout(world_size, tuple((b, range(r, r + 1)) for b, r in pieces))


def cut(box: Box, parts: int, *, by_rows: bool) -> list[Box]:
    """A box in row or column blocks whose sizes differ by at most one.

    Args:
        box: The box.
        parts: Number of blocks.
        by_rows: Row blocks rather than column blocks.

    Returns:
        The blocks in order.
    """
    length = box.shape[0 if by_rows else 1]
    cuts = [length * i // parts for i in range(parts + 1)]
    pairs = list(zip(cuts, cuts[1:]))
    top, left = box.row_start, box.col_start
    if by_rows:
        return [Box(top + a, top + b, left, box.col_stop) for a, b in pairs]
    return [Box(top, box.row_stop, left + a, left + b) for a, b in pairs]
