"""Who owns the matrices of a stack.

Each matrix has one owner, so that thousands of them are a few batches on each rank.
A matrix that lies whole on a rank is owned there and its gradient need not move; its
replicas divide what they hold. That is given up if it would leave most ranks idle (few
matrices on many ranks): then, as where no rank holds a whole matrix, any rank may own
any of them. Of the ranks that may, those with the least work with stacks come first.
Teams and owners of other matrices are chosen after that.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from sharded_adadiag.plan.blocks import cut
from sharded_adadiag.plan.geometry import Layout, Ranks
from sharded_adadiag.plan.regions import Box, Region, full
from sharded_adadiag.plan.view import MatrixView

# Entries that are worked on, and moved, together.
RUN_NUMEL = 1 << 20
# A rank may be given this many times its even share of a stack that lies there.
MOST_AT_HOME = 2


def divide(
    view: MatrixView, layout: Layout, cols: int, work: tuple[int, list[int]]
) -> list[tuple[int, int, int]]:
    """Divide a stack among owners.

    Args:
        view: How it is seen as matrices.
        layout: Where it is stored.
        cols: Columns of the view in which the layout is given.
        work: Of a matrix in a step, and of each rank with stacks so far; the latter is
            modified in place.

    Returns:
        All matrices in order: the first of some, their number, and their owner.
    """
    each, loads = work
    count, world_size = len(view.heights), len(layout)
    numel = view.heights[0] * view.cols
    whole = {}
    for region, ranks in layout.pieces:
        first, last = _whole_matrices(region, numel, cols)
        if first < last:
            whole[first, last] = ranks
    fair = all(
        (last - first) * world_size <= MOST_AT_HOME * count * len(ranks)
        for (first, last), ranks in whole.items()
    )
    given = []
    for first, last, ranks in _stretches(whole if fair else {}, count, world_size):
        least = heapq.nsmallest(last - first, ranks, key=lambda r: (loads[r], r))
        for owner, (start, stop) in zip(least, _even(first, last, len(least))):
            loads[owner] += (stop - start) * each
            given.append((start, stop - start, owner))
    return sorted(given)


def _stretches(
    whole: dict[tuple[int, int], Ranks], count: int, world_size: int
) -> Iterator[tuple[int, int, Ranks]]:
    """All matrices, some at a time, with the ranks that may own them."""
    for (first, last), ranks in whole.items():
        yield first, last, ranks
    # Those that anyone may own make up for what is uneven.
    done = 0
    for first, last in sorted([*whole, (count, count)]):
        if done < first:
            yield done, first, range(world_size)
        done = last


def runs(view: MatrixView, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut consecutive matrices into as many at a time as are worked on together.

    Args:
        view: How the stack is seen as matrices.
        first: The first of them.
        count: How many.

    Yields:
        The first and the number of some of them.
    """
    most = max(RUN_NUMEL // max(view.heights[0] * view.cols, 1), 1)
    for start, stop in _even(first, first + count, -(-count // most)):
        yield start, stop - start


def _even(first: int, last: int, parts: int) -> list[tuple[int, int]]:
    """A stretch in parts whose lengths differ by at most one."""
    boxes = cut(full(last - first, 1), parts, by_rows=True) if parts else []
    return [(first + box.row_start, first + box.row_stop) for box in boxes]


def _whole_matrices(region: Region, numel: int, cols: int) -> tuple[int, int]:
    """The first of the matrices that a region has all of, and the one behind them."""
    if isinstance(region, Box):
        if region.shape[1] != cols:
            return 0, 0
        start, stop = region.row_start * cols, region.row_stop * cols
    else:
        start, stop = region.start, region.stop
    return -(-start // numel), stop // numel
