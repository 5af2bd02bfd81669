"""Makes a planned exchange: pack, all-to-all, unpack.

A status word goes with every chunk, so that each rank learns of a failure on any
other in the collective it is in anyway, and all can raise together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.plan.exchange_plan import (
    HEADER_BYTES,
    Chunk,
    ExchangePlan,
    Move,
)
from sharded_adadiag.plan.geometry import Box, Region, as_flat, intersect


class Exchange:
    """Makes exchanges over one group, in buffers that are kept and reused.

    Args:
        comm: The group.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def start(self, plan, pieces, wire, work, *, device, status=0, into=""):  # type: ignore
        out, statuses = self.run(
            plan, pieces, wire, work, device=device, status=status, into=into
        )
        words = {r: w for r, w in enumerate(statuses) if w and r != self.comm.rank}
        return Pending(plan, out, words, self.comm.rank)

    def run(
        self,
        plan: ExchangePlan,
        pieces: Sequence[Tensor],
        wire: Sequence[torch.dtype],
        work: Sequence[torch.dtype],
        *,
        device: torch.device,
        status: int = 0,
        into: str = "",
    ) -> tuple[list[Tensor], list[int]]:
        """Move every matrix of the plan.

        Args:
            plan: The exchange.
            pieces: This rank's piece of each matrix in the source layout, in the
                shape of its region.
            wire: Dtype of each on the way.
            work: Dtype wanted of each at the target.
            device: Where the pieces are.
            status: This rank's status word; 0 is well.
            into: Where the results are put: they are overwritten by the next exchange
                with the same name. Empty for memory of their own.

        Returns:
            This rank's piece of each matrix in the target layout, and the status
            word of every rank. A piece that does not move
            or change dtype is returned as it is, not copied.
        """
        rank = self.comm.rank
        statuses = [0] * plan.world_size
        statuses[rank] = status
        arrivals: list[tuple[Chunk, Tensor]] = []
        if not plan.is_local:
            arrivals = self._all_to_all(plan, pieces, wire, device, status)
        results: list[Tensor] = []
        room = self._room(plan, work, into, device)
        moved = _by_matrix(arrivals, wire)
        for i, hop in enumerate(plan.hops):
            wanted = hop.target[rank]
            if hop.source[rank] == wanted and not hop.summed:
                results.append(pieces[i].to(work[i]))
            else:
                out = next(room)
                self._fill(out, hop, pieces[i], moved.get(i, ()), rank)
                results.append(out)
        if arrivals:
            words = [data[:HEADER_BYTES].view(torch.int64) for _, data in arrivals]
            # One transfer to the host, not one per rank.
            for (chunk, _), word in zip(arrivals, torch.cat(words).tolist()):
                statuses[chunk.rank] = word
        return results, statuses

    def _all_to_all(
        self,
        plan: ExchangePlan,
        pieces: Sequence[Tensor],
        wire: Sequence[torch.dtype],
        device: torch.device,
        status: int,
    ) -> list[tuple[Chunk, Tensor]]:
        """Pack what leaves this rank, exchange, and return the bytes that came."""
        rank = self.comm.rank
        outgoing, incoming = plan.sent(rank), plan.received(rank)
        sent = _sizes(outgoing, plan.world_size)
        got = _sizes(incoming, plan.world_size)
        place = self.comm.device(device)
        send = self._buffer("send", place, sum(sent))
        for chunk, data in _cut(send, outgoing):
            data[:HEADER_BYTES].view(torch.int64).fill_(status)
            for span in chunk.spans:
                hop, i = plan.hops[span.item], span.item
                held = hop.target[chunk.rank] if hop.summed else hop.source[rank]
                view = window(pieces[i], held, span.region, hop.cols)
                data[span.start : span.stop].view(wire[i]).view(view.shape).copy_(view)
        receive = self._buffer("receive", place, sum(got))
        self.comm.all_to_all(receive, send, got, sent)
        return list(_cut(receive, incoming))

    def _fill(
        self,
        out: Tensor,
        hop: Move,
        piece: Tensor,
        moved: Sequence[tuple[Region, Tensor]],
        rank: int,
    ) -> None:
        """Put together one matrix's target piece."""
        wanted = hop.target[rank]
        if hop.summed:
            if out.numel():
                out.copy_(piece)
            for _, data in moved:
                out.add_(data.view(out.shape))
            return
        held = hop.source[rank]
        shared = intersect(held, wanted, hop.cols)
        if shared is not None:
            window(out, wanted, shared, hop.cols).copy_(
                window(piece, held, shared, hop.cols)
            )
        for region, data in moved:
            view = window(out, wanted, region, hop.cols)
            view.copy_(data.view(view.shape))

    def _room(
        self,
        plan: ExchangePlan,
        work: Sequence[torch.dtype],
        into: str,
        device: torch.device,
    ) -> Iterator[Tensor]:
        """Uninitialised results for the matrices that move, in order."""
        rank = self.comm.rank
        shapes = [
            (hop.target[rank].shape, dtype)
            for hop, dtype in zip(plan.hops, work)
            if hop.summed or hop.source[rank] != hop.target[rank]
        ]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        if not into:
            yield from (torch.empty(s, dtype=d, device=device) for s, d in shapes)
            return
        strides = [-(-size // 64) * 64 for size in sizes]
        buffer = self._buffer(into, device, sum(strides))
        start = 0
        for (shape, dtype), size, stride in zip(shapes, sizes, strides):
            yield buffer[start : start + size].view(dtype).view(shape)
            start += stride

    def _buffer(self, name: str, device: torch.device, size: int) -> Tensor:
        """``size`` bytes, kept between steps."""
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self._buffers[name, device] = buffer
        return buffer[:size]


class Pending:
    def __init__(self, plan, out, words, rank):  # type: ignore
        self.plan, self.out, self.words, self.rank = plan, out, words, rank

    def finish(self, apart=()):  # type: ignore
        out = [
            [(hop.target[self.rank], value)] if i in apart else value
            for i, (hop, value) in enumerate(zip(self.plan.hops, self.out))
        ]
        return out, self.words


def _sizes(chunks: Sequence[Chunk], world_size: int) -> list[int]:
    """Bytes to or from each rank."""
    sizes = [0] * world_size
    for chunk in chunks:
        sizes[chunk.rank] = chunk.nbytes
    return sizes


def _cut(buffer: Tensor, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Tensor]]:
    """The part of a buffer that each message is."""
    start = 0
    for chunk in chunks:
        yield chunk, buffer[start : start + chunk.nbytes]
        start += chunk.nbytes


def _by_matrix(
    arrivals: Sequence[tuple[Chunk, Tensor]], wire: Sequence[torch.dtype]
) -> dict[int, list[tuple[Region, Tensor]]]:
    """What came for each matrix, in rank order, as views of the buffer."""
    moved: dict[int, list[tuple[Region, Tensor]]] = {}
    for chunk, data in arrivals:
        for span in chunk.spans:
            part = data[span.start : span.stop].view(wire[span.item])
            moved.setdefault(span.item, []).append((span.region, part))
    return moved


def window(piece: Tensor, held: Region, wanted: Region, cols: int) -> Tensor:
    """The view of a region inside a piece.

    Args:
        piece: The entries of ``held``, in its shape.
        held: A region.
        wanted: A region inside it, or an empty one.
        cols: Columns of the full matrix.

    Returns:
        A view with the shape of ``wanted``.
    """
    if isinstance(wanted, Box) and isinstance(held, Box):
        rows, width = wanted.shape
        if wanted.numel == 0:
            return piece.new_empty(wanted.shape)
        row, col = wanted.row_start - held.row_start, wanted.col_start - held.col_start
        return piece[row : row + rows, col : col + width]
    inside, around = as_flat(wanted, cols), as_flat(held, cols)
    start = inside.start - around.start
    return piece.view(-1)[start : start + inside.numel]
