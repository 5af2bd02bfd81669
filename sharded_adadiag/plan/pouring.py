"""Filling rounds with the lines of matrices that may be cut.

A rank that stores rows sends rows: if all ranks began with the first rows of their
matrices, the first ranks would send everything. So each begins elsewhere and goes
around, and where two meet at one sender nevertheless, the later one takes other lines.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.items import Item, Packing
from sharded_adadiag.plan.regions import Box

# Cuts are at multiples of these lines or fewer: products of odd widths are slower.
LINES = 64
# At least so many in a round, whatever its bound: narrower products cost much more.
FEWEST_LINES = 16
# A round's room is filled to within one of so many parts.
FINENESS = 16
# What lies on more ranks than this is taken to lie evenly on all.
FEW_SENDERS = 16
# Lines of narrower shards than so many cuts are not told apart by who sends them: that
# brings nothing and makes thousands of segments.
SHARD_CUTS = 4
# Ranks that send, each with its share of every line.
Senders = tuple[tuple[int, float], ...]


@dataclasses.dataclass(slots=True)
class _Segment:
    """Lines of a rank's block that come from the same ranks.

    Attributes:
        item: The matrix.
        block: The rank's block of it.
        start: The first of its lines that is in no round yet.
        stop: The end of the segment.
        senders: Who sends, each with its share of every line.
        evenly: The share of one rank of many that send alike.
        step: Cuts are at multiples of so many lines.
    """

    item: Item
    block: Box
    start: int
    stop: int
    senders: Senders
    evenly: float
    step: int


class _Senders:
    """Bytes that each rank sends in a round."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.each: dict[int, float] = {}
        self.evenly = 0.0
        self.most = 0.0

    def room(self, segment: _Segment) -> float:
        """Bytes that may still come from the senders of a segment."""
        rest = self.limit - self.evenly
        if segment.senders:
            each = self.each
            return min([(rest - each.get(r, 0.0)) / s for r, s in segment.senders])
        return (rest - self.most) / segment.evenly if segment.evenly else rest

    def take(self, segment: _Segment, nbytes: float) -> None:
        """Note bytes of a segment."""
        self.evenly += segment.evenly * nbytes
        for rank, share in segment.senders:
            sent = self.each.get(rank, 0.0) + share * nbytes
            self.each[rank] = sent
            if sent > self.most:
                self.most = sent


def pour(
    packing: Packing,
    queues: Sequence[Sequence[tuple[Item, Box]]],
    room: int,
    limit: int,
) -> None:
    """Fill the rounds' room one after another, on all ranks alike.

    Args:
        packing: The rounds; they become more as it takes.
        queues: By rank, the matrices that may be cut and the rank's block of each.
        room: Bytes that a rank may work on in a round.
        limit: Bytes that a rank may send in a round.
    """
    world_size = len(queues)
    waiting = {
        rank: _segments(queue, rank / world_size, room)
        for rank, queue in enumerate(queues)
        if queue
    }
    k = 0
    while waiting:
        if k == len(packing.rounds):
            packing.add_round()
        senders = _Senders(limit)
        ranks = list(waiting)
        turn = k % len(ranks)
        for rank in ranks[turn:] + ranks[:turn]:
            if senders.evenly >= limit:
                break
            _fill(packing, rank, k, waiting[rank], (room, senders))
            if not waiting[rank]:
                del waiting[rank]
        k += 1


def _fill(
    packing: Packing,
    rank: int,
    k: int,
    segments: list[_Segment],
    bounds: tuple[int, _Senders],
) -> None:
    """Fill a rank's room in a round, from the first segments that have senders."""
    room, senders = bounds
    some = packing.rounds[k]
    used, work = packing.used[rank][k], packing.work[rank][k]
    last: _Segment | None = None  # its slice may go on in the next segment
    spent = 0
    for n, segment in enumerate(segments):
        item, start = segment.item, segment.start
        blocks = some.get(item.position)
        begun = blocks.get(rank) if blocks else None
        if begun is not None and not (
            last is not None and last.item is item and last.start == last.stop == start
        ):
            continue
        taken = _lines_that_fit(segment, room - used, senders, first=not used)
        if taken:
            segment.start = start + taken
            new = item.slice(segment.block, start, segment.start)
            if blocks is None:
                blocks = some[item.position] = {}
            blocks[rank] = new if begun is None else _joined(begun, new)
            used += taken * item.line_bytes
            work += taken * item.line_work
            senders.take(segment, taken * item.line_bytes / item.copies)
            last = segment
            if segment.start == segment.stop:
                spent = n + 1
        if used + item.line_bytes * segment.step > room:
            break
    packing.used[rank][k], packing.work[rank][k] = used, work
    if spent:
        segments[:spent] = [s for s in segments[:spent] if s.start < s.stop]


def _joined(upper: Box, lower: Box) -> Box:
    return Box(upper.row_start, lower.row_stop, upper.col_start, lower.col_stop)


def _lines_that_fit(
    segment: _Segment, room: int, senders: _Senders, *, first: bool
) -> int:
    """Lines for so much room; all that is left of the segment if they fit."""
    item, left = segment.item, segment.stop - segment.start
    fit = room // item.line_bytes
    sent = int(senders.room(segment) * item.copies) // item.line_bytes
    if sent < fit:
        fit = sent
    if first and not senders.each and not senders.evenly and fit < FEWEST_LINES:
        fit = FEWEST_LINES  # in a round of its own, if need be
    if fit >= left:
        return left
    return fit // segment.step * segment.step if fit > 0 else 0


def _step(item: Item, room: int) -> int:
    """Cuts are at multiples of this power of two."""
    step = LINES
    while step > 1 and step * item.line_bytes * FINENESS > room:
        step //= 2
    return step


def _segments(
    queue: Sequence[tuple[Item, Box]], share: float, room: int
) -> list[_Segment]:
    """A rank's lines in the order in which it takes them if nobody is in the way.

    Args:
        queue: Its matrices and its blocks of them.
        share: Of all ranks, those before it.
        room: Bytes that it may work on in a round.

    Returns:
        Falling in work per byte, and then from where the rank begins to go around.
    """
    keyed = []
    for item, block in queue:
        intensity = item.line_work / item.line_bytes
        step, lines = _step(item, room), item.lines(block)
        parts = _split(item.storage, block, (step, _all_lines(item)), item.by_rows)
        for n, (start, stop, senders, evenly) in enumerate(parts):
            if item.by_rows and len(item.blocks) > 1:  # its senders are its team's own
                at, begin = start / lines, item.phase
            elif senders:
                at, begin = senders[0][0] / len(item.storage), share
            else:
                at, begin = start / lines, share
            order = -intensity, item.by_rows, (at - begin) % 1.0, item.position, n
            segment = _Segment(item, block, start, stop, senders, evenly, step)
            keyed.append((order, segment))
    keyed.sort(key=lambda pair: pair[0])
    return [segment for _, segment in keyed]


# The layers of a model repeat their matrices, and often teams do.
@functools.lru_cache(maxsize=4096)
def _split(
    storage: Layout, block: Box, steps: tuple[int, int], by_rows: bool
) -> list[tuple[int, int, Senders, float]]:
    """A block's lines by who sends them: the first and last, and as in `_Segment`.

    Args:
        storage: Where the matrix is stored.
        block: The block.
        steps: Lines between cuts, and of all blocks of the matrix.
        by_rows: Its lines are rows.

    Returns:
        Some lines after the other.
    """
    step, of_all = steps
    cols = block.shape[1]
    lines = block.shape[0 if by_rows else 1]
    evenly = [(0, lines, *_evenly_from(storage))]
    if not by_rows:
        return evenly
    if lines < 2 * step or len(storage.pieces) * step * SHARD_CUTS > of_all:
        # Shards are not much wider than cuts: many ranks send alike.
        width = max(-(-lines // 16), step)
        edges = [*range(0, lines, width), lines]
        return [(a, b, (), 0.0) for a, b in zip(edges, edges[1:])]
    parts: list[tuple[int, int, Senders, float]] = []
    done = 0
    for _, region, ranks in storage.overlapping(block, cols):
        if isinstance(region, Box):
            if region.shape[1] < cols:
                return evenly
            stop = region.row_stop - block.row_start
        else:  # a row belongs to whoever has its end; exact but for one row
            stop = region.stop // cols - block.row_start
        if stop > done:
            parts.append((done, stop, ((ranks[0], 1.0),), 0.0))
            done = stop
    return parts


def _all_lines(item: Item) -> int:
    return sum(item.lines(block) for block, _ in item.blocks)


@functools.lru_cache(maxsize=1024)
def _evenly_from(
    storage: Layout,
) -> tuple[Senders, float]:
    """The ranks that send a line of which every holder has a part."""
    pieces = storage.pieces
    numel = sum(piece.numel for piece, _ in pieces)
    if len(pieces) > FEW_SENDERS:
        return (), max(piece.numel for piece, _ in pieces) / numel
    return tuple((ranks[0], piece.numel / numel) for piece, ranks in pieces), 0.0
