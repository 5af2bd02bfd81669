"""Which bytes each rank sends to which: one hop of the matrices of a bucket.

The message from one rank to another is a chunk of bytes: an 8-byte status word, then
the pieces in order of falling item size (so that each starts aligned), then
zeros up to a multiple of 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property

from sharded_adadiag.plan.geometry import Layout, Region, full, holders, intersect

HEADER_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Hop:
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


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Transfer:
    """A region of matrix ``item`` that goes from one rank to another (or stays)."""

    item: int
    source: int
    target: int
    region: Region


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """Where a transfer lies in the chunk of its pair of ranks."""

    transfer: Transfer
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """One fused all-to-all.

    Attributes:
        world_size: Number of ranks.
        hops: The matrices it moves.
    """

    world_size: int
    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        for hop in self.hops:
            assert len(hop.source) == len(hop.target) == self.world_size
        received: dict[tuple[int, int], int] = {}
        for t in self.transfers:
            key = t.item, t.target
            received[key] = received.get(key, 0) + t.region.numel
        for i, hop in enumerate(self.hops):
            for rank, region in enumerate(hop.target):
                copies = self.world_size if hop.summed else 1
                assert received.get((i, rank), 0) == copies * region.numel

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every transfer, also those within a rank."""
        return tuple(t for i, hop in enumerate(self.hops) for t in _transfers(i, hop))

    @cached_property
    def is_local(self) -> bool:
        """Whether nothing leaves a rank, so that no collective is needed."""
        return all(t.source == t.target for t in self.transfers)

    @cached_property
    def chunks(self) -> dict[tuple[int, int], tuple[tuple[Slot, ...], int]]:
        """Slots and bytes of the message of each (source, target) pair."""
        between: dict[tuple[int, int], list[Transfer]] = {}
        for t in self.transfers:
            if t.source != t.target:
                between.setdefault((t.source, t.target), []).append(t)
        chunks = {}
        for pair, transfers in between.items():
            slots, start = [], HEADER_BYTES
            transfers.sort(key=lambda t: (-self.hops[t.item].itemsize, t))
            for t in transfers:
                stop = start + t.region.numel * self.hops[t.item].itemsize
                slots.append(Slot(t, start, stop))
                start = stop
            chunks[pair] = tuple(slots), -(-start // 8) * 8
        return chunks

    def chunk(self, source: int, target: int) -> tuple[tuple[Slot, ...], int]:
        """Slots and bytes of a message; the status word travels between all ranks."""
        if source == target:
            return (), 0
        return self.chunks.get((source, target), ((), HEADER_BYTES))

    def bytes_sent(self, rank: int) -> int:
        """Bytes that a rank sends to the others."""
        if self.is_local:
            return 0
        return sum(self.chunk(rank, other)[1] for other in range(self.world_size))

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
                Hop(hop.cols, hop.target, hop.source, size)
                for hop, size in zip(self.hops, itemsizes)
            ),
        )


def replicate(rows: int, cols: int, world_size: int) -> Layout:
    """The layout in which every rank holds everything."""
    return (full(rows, cols),) * world_size


def _transfers(item: int, hop: Hop) -> Iterable[Transfer]:
    if hop.summed:
        for target, region in enumerate(hop.target):
            if region.numel:
                for source in range(len(hop.source)):
                    yield Transfer(item, source, target, region)
        return
    pieces = holders(hop.source)
    for target, wanted in enumerate(hop.target):
        if not wanted.numel:
            continue
        for piece, ranks in pieces.items():
            shared = intersect(piece, wanted, hop.cols)
            if shared is not None:
                # A replica at hand is free; the others share the sending.
                near = target if target in ranks else ranks[target % len(ranks)]
                yield Transfer(item, near, target, shared)
