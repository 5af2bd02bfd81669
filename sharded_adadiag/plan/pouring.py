"""Filling rounds with the lines of matrices that may be cut.

A rank that stores rows sends rows: if all ranks began with the first rows of their
matrices, the first ranks would send everything. So each begins elsewhere and goes
around, and where two meet at one sender nevertheless, the later one takes other lines.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from sharded_adadiag.plan.geometry import Box, FlatRange, Layout
from sharded_adadiag.plan.items import Item, Packing

# Cuts are at multiples of these lines or fewer: products of odd widths are slower.
LINES = 64
# At least so many in a round, whatever its bound: narrower products cost much more.
FEWEST_LINES = 16
# A round's room is filled to within one of so many parts.
FINENESS = 16
# What lies on more ranks than this is taken to lie evenly on all.
FEW_SENDERS = 16


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
    """

    item: Item
    block: Box
    start: int
    stop: int
    senders: tuple[tuple[int, float], ...]
    evenly: float


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
        rooms = [(rest - self.each.get(r, 0.0)) / s for r, s in segment.senders]
        if segment.evenly:
            rooms.append((rest - self.most) / segment.evenly)
        return min(rooms, default=rest)

    def take(self, segment: _Segment, nbytes: float) -> None:
        """Note bytes of a segment."""
        self.evenly += segment.evenly * nbytes
        for rank, share in segment.senders:
            sent = self.each.get(rank, 0.0) + share * nbytes
            self.each[rank] = sent
            self.most = max(self.most, sent)


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
    used, work = packing.used[rank], packing.work[rank]
    last: _Segment | None = None  # its slice may go on in the next segment
    spent = 0
    for n, segment in enumerate(segments):
        item = segment.item
        begun = (some.get(item.position) or {}).get(rank)
        goes_on = (
            last is not None
            and begun is not None
            and (last.item is item and last.start == last.stop == segment.start)
        )
        if begun is not None and not goes_on:
            continue
        taken = _lines_that_fit(segment, room, used[k], senders)
        if taken:
            start, segment.start = segment.start, segment.start + taken
            new = item.slice(segment.block, start, segment.start)
            blocks = some.setdefault(item.position, {})
            assert blocks is not None
            blocks[rank] = new if begun is None else _joined(begun, new)
            used[k] += taken * item.line_bytes
            work[k] += taken * item.line_work
            senders.take(segment, taken * item.line_bytes / item.copies)
            last = segment
            spent = n + 1
        if used[k] + item.line_bytes * _step(item, room) > room:
            break
    segments[:spent] = [s for s in segments[:spent] if s.start < s.stop]


def _joined(upper: Box, lower: Box) -> Box:
    return Box(upper.row_start, lower.row_stop, upper.col_start, lower.col_stop)


def _lines_that_fit(segment: _Segment, room: int, used: int, senders: _Senders) -> int:
    """Lines for a round with so many bytes used; all that is left if there is room."""
    item, left = segment.item, segment.stop - segment.start
    fit = max(room - used, 0) // item.line_bytes
    sent = int(max(senders.room(segment), 0.0) * item.copies) // item.line_bytes
    fit = min(fit, sent)
    if not used and not senders.each and not senders.evenly:
        fit = max(fit, FEWEST_LINES)  # in a round of its own, if need be
    if fit >= left:
        return left
    step = _step(item, room)
    return fit // step * step


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
        for n, segment in enumerate(_split(item, block, room)):
            if item.by_rows and len(item.blocks) > 1:  # its senders are its team's own
                at, begin = segment.start / item.lines(block), item.phase
            elif segment.senders:
                at, begin = segment.senders[0][0] / len(item.storage), share
            else:
                at, begin = segment.start / item.lines(block), share
            order = -intensity, item.by_rows, (at - begin) % 1.0, item.position, n
            keyed.append((order, segment))
    keyed.sort(key=lambda pair: pair[0])
    return [segment for _, segment in keyed]


def _split(item: Item, block: Box, room: int) -> list[_Segment]:
    """A block's lines by who sends them."""
    lines, pieces = item.lines(block), item.storage.pieces
    if not item.by_rows:
        return [_Segment(item, block, 0, lines, *_evenly_from(item.storage))]
    step = _step(item, room)
    if lines < 2 * step or len(pieces) * step > _all_lines(item):
        # Narrower shards than cuts: many ranks send alike.
        width = max(-(-lines // 16), step)
        edges = [*range(0, lines, width), lines]
        return [_Segment(item, block, a, b, (), 0.0) for a, b in zip(edges, edges[1:])]
    cols = block.col_stop - block.col_start
    segments = []
    top, done = block.row_start, 0
    wanted = FlatRange(top * cols, block.row_stop * cols)
    for _, region, ranks in item.storage.overlapping(wanted, cols):
        if isinstance(region, Box):
            return [_Segment(item, block, 0, lines, *_evenly_from(item.storage))]
        # A row belongs to whoever has its end; that is exact but for one row.
        stop = region.stop // cols - top
        if stop > done:
            sender = ((ranks[0], 1.0),)
            segments.append(_Segment(item, block, done, stop, sender, 0.0))
            done = stop
    return segments


def _all_lines(item: Item) -> int:
    return sum(item.lines(block) for block, _ in item.blocks)


@functools.lru_cache(maxsize=1024)
def _evenly_from(
    storage: Layout,
) -> tuple[tuple[tuple[int, float], ...], float]:
    """Who sends a line of which all holders have a part."""
    pieces = storage.pieces
    numel = sum(piece.numel for piece, _ in pieces)
    if len(pieces) > FEW_SENDERS:
        return (), max(piece.numel for piece, _ in pieces) / numel
    return tuple((ranks[0], piece.numel / numel) for piece, ranks in pieces), 0.0
