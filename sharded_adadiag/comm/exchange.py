"""Makes a planned exchange: pack, all-to-all, unpack.

`Exchange.start` packs and sends, `Pending.finish` waits and unpacks: what lies between
the two calls runs while the bytes are on their way. Any number of exchanges may be
under way, each with a name of its own.

A status word goes with all data, so that who needs a rank's results learns that it
has failed to make them. Ranks without data for each other exchange nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.comm.collectives import Communicator, Done, Handle
from sharded_adadiag.plan.copies import Arrival, CopyList, Place, inside
from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.regions import Region

# Results begin at multiples of this many bytes of the memory that they share.
ALIGNMENT = 64


class Exchange:
    """Makes exchanges over one group, in buffers that are kept and reused.

    Args:
        comm: The ranks that exchange; all of them make the same exchanges in order.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._buffers: dict[tuple[str, str, torch.device], Tensor] = {}
        self._unread: list[tuple[list[int], Tensor]] = []
        self._latest: weakref.WeakValueDictionary[str, Pending] = (
            weakref.WeakValueDictionary()
        )

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
    ) -> tuple[list[Tensor], dict[int, int]]:
        """Move every matrix of the plan, and wait for the end.

        Args:
            plan: What goes from whom to whom.
            pieces: This rank's piece of each matrix in the source layout.
            wire: Dtype of each matrix in the messages.
            work: Dtype of each result.
            device: Device of the pieces and of the results.
            status: This rank's status word; 0 means success.
            into: Name of the memory for messages and results; empty for new memory.

        Returns:
            What `Pending.finish` returns.
        """
        results, statuses = self.start(
            plan, pieces, wire, work, device=device, status=status, into=into
        ).finish()
        return results, statuses | self.unread_statuses()

    def start(
        self,
        plan: ExchangePlan,
        pieces: Sequence[Tensor],
        wire: Sequence[torch.dtype],
        work: Sequence[torch.dtype],
        *,
        device: torch.device,
        status: int = 0,
        into: str = "",
        messages: str = "",
    ) -> Pending:
        """Pack and send. On an accelerator the host waits for nothing.

        Args:
            plan: What goes from whom to whom.
            pieces: This rank's piece of each matrix in the source layout, in the
                shape of its region. They stay as they are until the exchange ends.
            wire: Dtype of each matrix in the messages.
            work: Dtype of each result.
            device: Device of the pieces and of the results.
            status: This rank's status word; 0 means success.
            into: Name of the memory for messages and results. The next exchange with
                the same name overwrites it, and starts only when this one has ended.
                Empty for memory of its own.
            messages: Another name for that of the messages: exchanges that come one
                after the other may share it and keep their results.

        Returns:
            The exchange under way.
        """
        rank = self.comm.rank
        messages = messages or into
        earlier = self._latest.get(messages)
        assert earlier is None or earlier.ended, f"{messages} is still under way"
        pending = Pending(
            copies=plan.prepared.get(rank) or plan.prepare(rank),
            given=pieces,
            pieces=[piece.contiguous() for piece in pieces],
            wire=wire,
            work=work,
            device=device,
            status=(rank, status),
            into=into,
            memory=functools.partial(self._memory, into),
            messages=functools.partial(self._memory, messages),
            unread=self._unread if self.comm.device(device).type != "cpu" else None,
        )
        if not plan.is_local:
            pending.send(self.comm)
        if messages:
            self._latest[messages] = pending
        return pending

    def unread_statuses(self) -> dict[int, int]:
        """The status words of others that were left on an accelerator.

        Reading them there would make the host wait for every exchange, so they are
        read together: once in a step.

        Returns:
            Those that are not 0, by rank.
        """
        ranks = [rank for some, _ in self._unread for rank in some]
        words = [heads for _, heads in self._unread]
        self._unread.clear()
        read = torch.cat(words).tolist() if words else []
        return {rank: word for rank, word in zip(ranks, read) if word}

    def _memory(self, name: str, use: str, device: torch.device, size: int) -> Tensor:
        """``size`` bytes: kept for the next exchange of the same name if it has one."""
        buffer = self._buffers.get((name, use, device))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            if name:
                self._buffers[name, use, device] = buffer
        return buffer[:size]


@dataclasses.dataclass(eq=False)
class Pending:
    """An exchange under way. Either `finish` or `parts` ends it, once.

    Attributes:
        copies: Which entries this rank packs, sends, receives and unpacks.
        given: This rank's piece of each matrix in the source layout.
        pieces: The same, contiguous.
        wire: Dtype of each matrix in the messages.
        work: Dtype of each result.
        device: Device of the pieces and of the results.
        status: This rank and its status word.
        into: Name of the memory; empty if each result has its own.
        memory: Gives bytes for a use on a device.
        messages: The same, for what is sent and received.
        unread: Where the status words of others are put, if they are not read at once.
        ended: Whether the results were taken.
    """

    copies: CopyList
    given: Sequence[Tensor]
    pieces: Sequence[Tensor]
    wire: Sequence[torch.dtype]
    work: Sequence[torch.dtype]
    device: torch.device
    status: tuple[int, int]
    into: str
    memory: Callable[[str, torch.device, int], Tensor]
    messages: Callable[[str, torch.device, int], Tensor]
    unread: list[tuple[list[int], Tensor]] | None = None
    ended: bool = False
    _handle: Handle = dataclasses.field(default_factory=Done)
    # Both live until the collective has ended.
    _sent: _Bytes | None = None
    _received: _Bytes | None = None

    def send(self, comm: Communicator) -> None:
        """Pack what leaves this rank and start the all-to-all.

        Args:
            comm: The ranks that exchange.
        """
        copies, place = self.copies, comm.device(self.device)
        sent, got = _sizes(copies.sent, comm.size), _sizes(copies.received, comm.size)
        self._sent = _Bytes(self.messages("send", place, sum(sent)))
        self._received = _Bytes(self.messages("receive", place, sum(got)))
        word = torch.full((1,), self.status[1], dtype=torch.int64, device=place)
        pairs = [(head, word) for head in self._sent.heads(copies.sent)]
        for copy in copies.packed:
            target = self._sent.of(self.wire[copy.item], copy.target)
            pairs.append((target, _view(self.pieces[copy.item], copy.source)))
        _copy(pairs)
        self._handle = comm.start_all_to_all(
            self._received.memory, self._sent.memory, got, sent
        )

    def finish(self, apart: Collection[int] = ()) -> tuple[list[Any], dict[int, int]]:
        """Wait for the data and put this rank's new pieces together.

        On an accelerator the host does not wait, and what status words others have
        sent is left to `Exchange.unread_statuses`.

        Args:
            apart: Positions of matrices that are not put together.

        Returns:
            This rank's piece of each matrix in the target layout, and the status
            words that are not 0, by rank: of the ranks that sent data, and its own.
            A piece that neither moves nor changes dtype is returned as it is. Of a
            matrix that is not put together the result is what this rank has now, its
            own share first, then what came in rank order: pairs of a region and its
            entries in the wanted dtype. Where no dtype changes these are views of the
            given pieces and of the bytes received, valid until the next exchange of
            the same name.
        """
        self._wait()
        results: list[Any] = []
        copied: list[tuple[Tensor, Tensor]] = []
        added: list[tuple[Tensor, Tensor]] = []
        room = self._room(apart)
        for i, arrival in enumerate(self.copies.arrivals):
            if i in apart:
                results.append(self._parts(i, arrival))
                continue
            if arrival.unmoved:
                results.append(self.given[i].to(self.work[i]))
                continue
            assert arrival.whole, "only a part of the matrix comes"
            out = next(room)
            results.append(out)
            for copy in arrival.own:
                source = _view(self.pieces[i], copy.source)
                copied.append((_view(out, copy.target), source))
            # A rank without a summand of its own begins with the first that comes.
            first = bool(arrival.own)
            for k, copy in enumerate(arrival.came, start=first):
                came = added if arrival.summed and k else copied
                came.append((_view(out, copy.target), self._arrived(i, copy.source)))
        _copy(copied)
        for out, summand in added:  # in rank order, which the sum's rounding tells
            out.add_(summand)
        return results, self._statuses()

    def parts(self) -> tuple[list[list[tuple[Region, Tensor]]], dict[int, int]]:
        """Wait for the data and return all of it as it came, not put together.

        Returns:
            As from `finish`.
        """
        return self.finish(range(len(self.copies.arrivals)))

    def _parts(self, i: int, arrival: Arrival) -> list[tuple[Region, Tensor]]:
        assert not arrival.summed, "a sum has no parts"
        dtype, piece = self.work[i], self.pieces[i]
        here = [(c.region, _view(piece, c.source).to(dtype)) for c in arrival.own]
        for copy in arrival.came:
            data = self._arrived(i, copy.source).to(self.device, dtype)
            here.append((copy.region, data))
        return here

    def _wait(self) -> None:
        assert not self.ended, "an exchange ends once"
        self.ended = True
        self._handle.wait()

    def _arrived(self, item: int, place: Place) -> Tensor:
        assert self._received is not None
        return self._received.of(self.wire[item], place)

    def _room(self, apart: Collection[int]) -> Iterator[Tensor]:
        """Uninitialised results for the matrices that move, in order."""
        made = [
            (arrival.shape, dtype)
            for i, (arrival, dtype) in enumerate(zip(self.copies.arrivals, self.work))
            if not arrival.unmoved and i not in apart
        ]
        if not self.into:  # who keeps one result keeps no memory of the others
            for shape, dtype in made:
                yield torch.empty(shape, dtype=dtype, device=self.device)
            return
        sizes = [
            -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            for shape, dtype in made
        ]
        buffer = self.memory("results", self.device, sum(sizes))
        start = 0
        for (shape, dtype), size in zip(made, sizes):
            stop = start + math.prod(shape) * dtype.itemsize
            yield buffer[start:stop].view(dtype).view(shape)
            start += size

    def _statuses(self) -> dict[int, int]:
        words = dict([self.status])
        if self._received is not None and self.copies.received:
            heads = torch.cat(list(self._received.heads(self.copies.received)))
            if self.unread is None:
                words.update(zip(self.copies.received, heads.tolist()))
            else:
                self.unread.append((list(self.copies.received), heads))
        return {rank: words[rank] for rank in sorted(words) if words[rank]}


class _Bytes:
    """Memory, seen as elements of any dtype.

    Args:
        memory: 1-D tensor of ``uint8``.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._typed: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype, place: Place) -> Tensor:
        """The view of a place."""
        whole = self._typed.get(dtype)
        if whole is None:
            whole = self._typed[dtype] = self.memory.view(dtype)
        return _view(whole, place)

    def heads(self, sizes: Mapping[int, int]) -> Iterator[Tensor]:
        """The status word of each message, given the messages' sizes in bytes."""
        starts = itertools.accumulate(sizes.values(), initial=0)
        for start, _ in zip(starts, sizes):
            yield self.of(torch.int64, Place((1,), (1,), start // 8))


def window(piece: Tensor, held: Region, wanted: Region, cols: int) -> Tensor:
    """The view of a region inside a piece.

    Args:
        piece: A contiguous tensor in the shape of ``held``.
        held: The region whose entries the piece has.
        wanted: A region inside it, or an empty one.
        cols: Columns of the full matrix.

    Returns:
        A view with the shape of ``wanted``.
    """
    assert piece.is_contiguous()
    if wanted.numel == 0:
        return piece.new_empty(wanted.shape)
    return _view(piece, inside(held, wanted, cols))


def _view(memory: Tensor, place: Place) -> Tensor:
    """The view of a place inside contiguous memory."""
    if memory.shape == place.size:
        return memory
    start = memory.storage_offset() + place.offset
    return memory.as_strided(place.size, place.stride, start)


def _sizes(of: Mapping[int, int], world_size: int) -> list[int]:
    """Bytes to or from each rank."""
    sizes = [0] * world_size
    for rank, size in of.items():
        sizes[rank] = size
    return sizes


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy to the first of each pair from the second.

    One call on the CPU. On an accelerator a call is a few kernels if all its tensors
    are contiguous and of one pair of dtypes, so there is one for each kind of pair.
    """
    alike: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        kind: object = None
        if not target.is_cpu:
            strided = not (target.is_contiguous() and source.is_contiguous())
            kind = target.dtype, source.dtype, strided
        targets, sources = alike.setdefault(kind, ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)
