"""Which bytes each rank sends to which: one hop of the matrices of a bucket.

The message from one rank to another is a chunk of bytes: an 8-byte status word, then
the pieces in order of falling item size (so that each starts aligned), then
zeros up to a multiple of 8.

A rank lists only what it sends and receives itself; what all ranks together move is a
sum over layouts. So a plan costs a rank about the same on two ranks as on thousands.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from sharded_adadiag.plan.geometry import Layout, Region, shared_regions

HEADER_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """One matrix of an exchange.

    Attributes:
        cols: Columns of the full matrix.
        source: Where its entries are.
        target: Where they must go.
        itemsize: Bytes of an element on the way.
        summed: Every source holds a summand of the target, not a part of it.
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
                yield from ((source, wanted) for source in range(len(self.source)))
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
            for region, targets in self.target.pieces:
                yield from ((target, region) for target in targets)
            return
        replicas = self.source.holders(rank)
        held = self.source[rank]
        for _, shared, targets in self.target.overlapping(held, self.cols):
            for target in targets:
                if len(replicas) == 1 or _sender(replicas, target) == rank:
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
        return target.numel * (len(source) - 1)
    if source == target:
        return 0
    fewer, more = sorted((source, target), key=lambda side: len(side.pieces))
    at_hand = 0
    for region, ranks in fewer.pieces:
        for rank in ranks:
            at_hand += sum(r.numel for r in shared_regions(region, more[rank], cols))
    return target.numel - at_hand


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Where a region of matrix ``item`` lies in the chunk of a pair of ranks."""

    item: int
    region: Region
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
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
    """

    world_size: int
    hops: tuple[Move, ...]
    # Messages of the rank that exchanges, listed once.
    _sent: dict[int, list[Chunk]] = _own_field()
    _received: dict[int, list[Chunk]] = _own_field()

    def __post_init__(self) -> None:
        for hop in self.hops:
            assert len(hop.source) == len(hop.target) == self.world_size

    @cached_property
    def is_local(self) -> bool:
        """Whether nothing leaves a rank, so that no collective is needed."""
        return all(hop.moved_bytes == 0 for hop in self.hops)

    def sent(self, rank: int) -> list[Chunk]:
        """The messages of a rank to each other rank; the status word goes to all."""
        if rank not in self._sent:
            self._sent[rank] = self._leaving(rank)
        return self._sent[rank]

    def received(self, rank: int) -> list[Chunk]:
        """The messages of each other rank to a rank."""
        if rank not in self._received:
            arriving = (hop.arriving(rank) for hop in self.hops)
            self._received[rank] = self._chunks(rank, arriving)
        return self._received[rank]

    def bytes_sent(self, rank: int) -> int:
        """Bytes that a rank sends to the others."""
        return 0 if self.is_local else sum(c.nbytes for c in self._leaving(rank))

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

    def _leaving(self, rank: int) -> list[Chunk]:
        return self._chunks(rank, (hop.leaving(rank) for hop in self.hops))

    def _chunks(
        self, rank: int, regions: Iterable[Iterator[tuple[int, Region]]]
    ) -> list[Chunk]:
        """What passes between a rank and each other one, in rank order."""
        between: dict[int, list[tuple[int, int, Region]]] = {}
        for item, (hop, some) in enumerate(zip(self.hops, regions)):
            for other, region in some:
                if other != rank:
                    key = -hop.itemsize, item, region
                    between.setdefault(other, []).append(key)
        return [
            self._chunk(other, sorted(between.get(other, ())))
            for other in range(self.world_size)
            if other != rank
        ]

    def _chunk(self, other: int, parts: Sequence[tuple[int, int, Region]]) -> Chunk:
        spans, start = [], HEADER_BYTES
        for negative_size, item, region in parts:
            stop = start - region.numel * negative_size
            spans.append(Span(item, region, start, stop))
            start = stop
        return Chunk(other, tuple(spans), -(-start // 8) * 8)
