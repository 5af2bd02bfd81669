"""What a round asks of those who store its matrices."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

from sharded_adadiag.plan.geometry import Layout, Ranks
from sharded_adadiag.plan.items import Blocks, Item
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.regions import Box, FlatRange


def most_stored(
    matrices: Sequence[MatrixPlan], items: Sequence[Item], some: Mapping[int, Blocks]
) -> int:
    """The most that one rank has stored of what is worked on in a round.

    Args:
        matrices: All matrices.
        items: The matrices as items, in the same order.
        some: The blocks of the round, by position of the matrix.

    Returns:
        Bytes in the dtype of the work; columns of flat ranges are taken to be spread
        evenly, which is exact but for one row.
    """
    told = _told(matrices, items, some)
    if all(len(ranks) == 1 for ranks in told):
        return int(max(told.values(), default=0.0))
    held: dict[int, float] = {}
    for ranks, nbytes in told.items():
        for rank in ranks:
            held[rank] = held.get(rank, 0.0) + nbytes
    return int(max(held.values(), default=0.0))


def _told(
    matrices: Sequence[MatrixPlan], items: Sequence[Item], some: Mapping[int, Blocks]
) -> dict[Ranks, float]:
    """Bytes that each of some ranks has; replicas are mostly the same ranks."""
    # What lies alike adds up before it is told to ranks.
    shares: dict[Layout, float] = {}
    rows: dict[tuple[Layout, int], list[tuple[int, float]]] = {}
    for i, blocks in some.items():
        view = matrices[i].view
        if len(matrices[i].route.stages) < 2:
            continue
        if blocks is not None and items[i].by_rows and _ranges(view.layout, view.cols):
            events = rows.setdefault((view.layout, view.cols), [])
            for block in blocks.values():
                events.append((block.row_start * view.cols, view.work_itemsize))
                events.append((block.row_stop * view.cols, -view.work_itemsize))
            continue
        share = 1.0
        if blocks is not None:
            share = sum(block.numel for block in blocks.values()) / view.numel
        so_far = shares.get(view.layout, 0.0)
        shares[view.layout] = so_far + share * view.work_itemsize
    told: dict[Ranks, float] = {}
    for layout, share in shares.items():
        for piece, ranks in layout.pieces:
            told[ranks] = told.get(ranks, 0.0) + piece.numel * share
    for (layout, cols), events in rows.items():
        for ranks, nbytes in _under(sorted(events), _ranges(layout, cols)):
            told[ranks] = told.get(ranks, 0.0) + nbytes
    return told


def _under(
    events: Sequence[tuple[int, float]],
    ranges: Sequence[tuple[FlatRange, Ranks]],
) -> Iterable[tuple[Ranks, float]]:
    """The area of each range under a function that jumps at the events."""
    at, density = 0, 0.0
    jumps = iter([*events, (ranges[-1][0].stop, 0.0)])
    position, jump = next(jumps)
    for piece, ranks in ranges:
        area = 0.0
        at = piece.start
        while position < piece.stop:
            area += density * max(position - at, 0)
            at = max(position, at)
            density += jump
            position, jump = next(jumps)
        area += density * (piece.stop - at)
        if area:
            yield ranks, area


@functools.lru_cache(maxsize=1024)
def _ranges(layout: Layout, cols: int) -> list[tuple[FlatRange, Ranks]]:
    """The pieces of a matrix as ascending flat ranges; none if they are none."""
    ranges = []
    for piece, ranks in layout.pieces:
        if isinstance(piece, Box):
            if piece.shape[1] != cols:
                return []
            piece = FlatRange(piece.row_start * cols, piece.row_stop * cols)
        ranges.append((piece, ranks))
    return sorted(ranges, key=lambda pair: pair[0])
