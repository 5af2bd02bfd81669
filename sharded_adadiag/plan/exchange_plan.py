"""Which bytes each rank sends to which: one hop of the matrices of a bucket.

The message from one rank to another is a chunk of bytes: an 8-byte status word, then
the pieces in order of falling item size (so that each starts aligned), then unused
bytes up to a multiple of 8. There is a message only where there is data.

A rank lists only what it sends and receives itself; what all ranks together move is a
sum over layouts. So a plan costs a rank about the same on two ranks as on thousands.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sharded_adadiag.plan.copies import (
    Arrival,
    Copy,
    CopyList,
    Place,
    dense,
    inside,
)
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.regions import Region, shared_regions

HEADER_BYTES = 8
# Matrices and regions, in the order of a message, by the other rank.
Between = dict[int, list[tuple[int, Region]]]
# From a matrix and a rank to the other ranks and regions.
Way = Callable[["Move", int], Iterator[tuple[int, Region]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """One matrix of an exchange.

    One of the two layouts covers all that the other does. Where the target covers more
    (the way back of some blocks of a matrix), only what the source has moves.

    Attributes:
        cols: Columns of the full matrix.
        source: Where its entries are.
        target: Where they must go.
        itemsize: Bytes of an element on the way.
        summed: Every rank that holds any holds a summand of the whole matrix, not a
            part of it.
    """

    cols: int
    source: Layout
    target: Layout
    itemsize: int
    summed: bool = False

    def arriving(self, rank: int) -> Iterator[tuple[int, Region]]:
        """What a rank needs for its target region, and from whom, itself included.

        Args:
            rank: The rank.

        Yields:
            A rank and the region that comes from it.
        """
        wanted = self.target[rank]
        if self.summed:
            if wanted.numel:
                ((_, sources),) = self.source.pieces
                yield from ((source, wanted) for source in sources)
            return
        for _, shared, ranks in self.source.overlapping(wanted, self.cols):
            yield _sender(ranks, rank), shared

    def leaving(self, rank: int) -> Iterator[tuple[int, Region]]:
        """What a rank sends of its source region, and to whom, itself included.

        Args:
            rank: The rank.

        Yields:
            A rank and the region that goes to it.
        """
        if self.summed:
            there = self.target.pieces if self.source[rank].numel else ()
            for region, targets in there:
                yield from ((target, region) for target in targets)
            return
        replicas = self.source.holders(rank)
        if not replicas:
            return
        held = self.source[rank]
        alone = len(replicas) == 1
        for _, shared, targets in self.target.overlapping(held, self.cols):
            for target in targets:
                if alone or _sender(replicas, target) == rank:
                    yield target, shared

    @property
    def moved_bytes(self) -> int:
        """Bytes that all ranks together send to others, without status words."""
        ends = self.cols, self.source, self.target, self.summed
        return _moved_numel(*ends) * self.itemsize


def _sender(replicas: Sequence[int], target: int) -> int:
    """Who of several holders sends: a replica at hand is free, others take turns."""
    return target if target in replicas else replicas[target % len(replicas)]


@functools.lru_cache(maxsize=4096)
def _moved_numel(cols: int, source: Layout, target: Layout, summed: bool) -> int:
    """Entries wanted by ranks that do not hold them."""
    if summed:
        ((_, sources),) = source.pieces
        return sum(
            region.numel * (len(sources) - (rank in sources))
            for region, ranks in target.pieces
            for rank in ranks
        )
    if source == target:
        return 0
    fewer, more = sorted((source, target), key=_holders)
    at_hand = sum(
        shared.numel
        for region, ranks in fewer.pieces
        for rank in ranks
        for shared in shared_regions(region, more[rank], cols)
    )
    return _wanted_numel(cols, source, target) - at_hand


def _holders(layout: Layout) -> int:
    """Ranks that hold any entries."""
    return sum(len(ranks) for _, ranks in layout.pieces)


def _wanted_numel(cols: int, source: Layout, target: Layout) -> int:
    """Entries of the source that all ranks together want."""
    there = sum(region.numel for region, _ in source.pieces)
    if there >= sum(region.numel for region, _ in target.pieces):
        return target.numel
    copies = {len(ranks) for _, ranks in target.pieces}
    if len(copies) == 1:
        return there * copies.pop()
    return sum(
        shared.numel * len(ranks)
        for region, _ in source.pieces
        for _, shared, ranks in target.overlapping(region, cols)
    )


class Span(NamedTuple):
    """Where a region of matrix ``item`` lies in the chunk of a pair of ranks."""

    item: int
    region: Region
    start: int
    stop: int


class Chunk(NamedTuple):
    """The message between this rank and another.

    Attributes:
        rank: The other rank.
        spans: What it is made of.
        nbytes: Its length with the status word.
    """

    rank: int
    spans: tuple[Span, ...]
    nbytes: int


def _own_field() -> Any:
    return dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """One fused all-to-all.

    Attributes:
        world_size: Number of ranks.
        hops: The matrices it moves.
        prepared: What a rank copies, by rank, once `prepare` has listed it.
    """

    world_size: int
    hops: tuple[Move, ...]
    # Of the rank that exchanges, listed once.
    prepared: dict[int, CopyList] = _own_field()

    def __post_init__(self) -> None:
        for hop in self.hops:
            assert len(hop.source) == len(hop.target) == self.world_size

    @cached_property
    def is_local(self) -> bool:
        """Whether nothing leaves a rank, so that no collective is needed."""
        return all(hop.moved_bytes == 0 for hop in self.hops)

    def sent(self, rank: int) -> list[Chunk]:
        """The messages of a rank, to those that get data of it, in rank order."""
        return self._chunks(self._between(rank, Move.leaving, self._order))

    def received(self, rank: int) -> list[Chunk]:
        """The messages to a rank, from those that have data for it, in rank order."""
        return self._chunks(self._between(rank, Move.arriving, self._order))

    def sizes_sent(self, rank: int) -> dict[int, int]:
        """Bytes of the messages of a rank, by the rank that gets one."""
        return self._sizes_of(rank, Move.leaving)

    def sizes_received(self, rank: int) -> dict[int, int]:
        """Bytes of the messages to a rank, by the rank that sends one."""
        return self._sizes_of(rank, Move.arriving)

    def bytes_sent(self, rank: int) -> int:
        """Bytes that a rank sends to the others, status words included."""
        return 0 if self.is_local else sum(self.sizes_sent(rank).values())

    def messages_sent(self, rank: int) -> int:
        """Ranks that a rank sends anything to."""
        return 0 if self.is_local else len(self.sizes_sent(rank))

    def prepare(self, rank: int) -> CopyList:
        """What a rank copies: listed at the first call, kept for all that follow."""
        if rank not in self.prepared:
            self.prepared[rank] = self._copies(rank)
        return self.prepared[rank]

    def inverse(self, itemsizes: Sequence[int]) -> ExchangePlan:
        """The way back: every holder of a piece, replicas too, gets it.

        Args:
            itemsizes: Bytes of an element of each matrix on the way back.

        Returns:
            The plan with sources and targets swapped.
        """
        return ExchangePlan(
            self.world_size,
            tuple(
                Move(hop.cols, hop.target, hop.source, size)
                for hop, size in zip(self.hops, itemsizes)
            ),
        )

    @cached_property
    def _order(self) -> list[int]:
        """Positions of the matrices as they follow each other in a message."""
        return sorted(range(len(self.hops)), key=lambda i: -self.hops[i].itemsize)

    def _sizes_of(self, rank: int, way: Way) -> dict[int, int]:
        """Bytes of the message between a rank and each other one, in no order."""
        data: dict[int, int] = {}
        for hop in self.hops:
            for other, region in way(hop, rank):
                nbytes = region.numel * hop.itemsize
                data[other] = data.get(other, HEADER_BYTES) + nbytes
        data.pop(rank, None)
        return {other: _padded(nbytes) for other, nbytes in data.items()}

    def _between(self, rank: int, way: Way, items: Sequence[int]) -> Between:
        """What of some matrices passes between a rank and others, in rank order."""
        between: Between = {}
        for item in items:
            for other, region in way(self.hops[item], rank):
                if other != rank:
                    if other in between:
                        between[other].append((item, region))
                    else:
                        between[other] = [(item, region)]
        return dict(sorted(between.items()))

    def _chunks(self, between: Between) -> list[Chunk]:
        chunks = []
        for other, parts in between.items():
            spans, start = [], HEADER_BYTES
            for item, region in parts:
                stop = start + region.numel * self.hops[item].itemsize
                spans.append(Span(item, region, start, stop))
                start = stop
            chunks.append(Chunk(other, tuple(spans), _padded(start)))
        return chunks

    def _sizes(self, between: Between) -> dict[int, int]:
        sizes = {}
        for other, parts in between.items():
            data = (region.numel * self.hops[item].itemsize for item, region in parts)
            sizes[other] = _padded(HEADER_BYTES + sum(data))
        return sizes

    def _copies(self, rank: int) -> CopyList:
        regions = [(hop.source[rank], hop.target[rank]) for hop in self.hops]
        # Of most matrices one of many ranks has nothing.
        own = [i for i in self._order if regions[i][0].numel or regions[i][1].numel]
        outgoing = self._between(rank, Move.leaving, own)
        incoming = self._between(rank, Move.arriving, own)
        # Many replicas get the same: where it is, and how it lies in a message.
        places: dict[tuple[int, Region], tuple[Place, Place]] = {}
        leaving = []
        for item, region, start in self._placed(outgoing):
            hop, known = self.hops[item], places.get((item, region))
            if known is None:
                place = inside(regions[item][0], region, hop.cols)
                known = places[item, region] = place, dense(place.size)
            source, (size, stride, _) = known
            target = Place(size, stride, start // hop.itemsize)
            leaving.append(Copy(item, region, source, target))
        came: dict[int, list[Copy]] = {}
        for item, region, start in self._placed(incoming):
            hop = self.hops[item]
            target = inside(regions[item][1], region, hop.cols)
            source = dense(target.size, start // hop.itemsize)
            came.setdefault(item, []).append(Copy(item, region, source, target))
        return CopyList(
            self._sizes(outgoing),
            self._sizes(incoming),
            tuple(leaving),
            tuple(
                _arrival(item, hop, *regions[item], came.get(item, ()))
                if regions[item][1].numel
                else _no_arrival(*regions[item], hop.summed)
                for item, hop in enumerate(self.hops)
            ),
        )

    def _placed(self, between: Between) -> Iterator[tuple[int, Region, int]]:
        """Matrix, region and first byte in the buffer of all messages."""
        start = 0
        for parts in between.values():
            start += HEADER_BYTES
            for item, region in parts:
                yield item, region, start
                start += region.numel * self.hops[item].itemsize
            start = _padded(start)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def _arrival(
    item: int, hop: Move, held: Region, wanted: Region, came: Sequence[Copy]
) -> Arrival:
    """The new piece of one matrix on a rank that gets any of it."""
    if hop.summed:
        summand = []
        if held.numel:
            there = dense(wanted.shape)
            summand = [Copy(item, wanted, inside(held, wanted, hop.cols), there)]
        return Arrival(wanted.shape, False, True, True, tuple(summand), tuple(came))
    own = tuple(
        Copy(
            item,
            shared,
            inside(held, shared, hop.cols),
            inside(wanted, shared, hop.cols),
        )
        for shared in shared_regions(held, wanted, hop.cols)
    )
    filled = sum(copy.region.numel for copy in (*own, *came))
    whole = filled == wanted.numel
    return Arrival(wanted.shape, held == wanted, whole, False, own, tuple(came))


@functools.lru_cache(maxsize=1024)
def _no_arrival(held: Region, wanted: Region, summed: bool) -> Arrival:
    """The new piece where it is empty, kept once: one of many ranks has mostly such."""
    return Arrival(wanted.shape, held == wanted and not summed, True, summed, (), ())
