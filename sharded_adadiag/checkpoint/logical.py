"""State tensors between the place where they are used and their saved form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_adadiag.comm.collectives import Communicator, ProcessGroup
from sharded_adadiag.comm.exchange import Exchange
from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import Layout, alone, cut_rows
from sharded_adadiag.plan.regions import Box, entries_above

# Bytes of full state tensors moved at once: bounds the memory of saving.
CHUNK_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, slots=True)
class StateTensor:
    """One state tensor and where its entries are.

    It is seen as a matrix, and this as blocks of rows, of which each lies on the ranks
    in its own way: one block, or one for each of several matrices.

    Attributes:
        name: Name of its parameter, for messages.
        key: Its key in the parameter's saved state, such as ``exp_avg``.
        shape: The logical shape in the saved form.
        cols: Columns of the matrix view in which the regions are given.
        blocks: The blocks of rows, in order: the number of rows, and the region of
            each rank within the block.
        dtype: Dtype in use, and in the saved form.
        saved: The region of each rank in the saved form; None is an even share of
            the first dimension.
        summed: Each rank that holds any holds a summand, and the sum is saved. What is
            loaded is then the first one's, and the others get nothing.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    cols: int
    blocks: tuple[tuple[int, Layout], ...]
    dtype: torch.dtype
    saved: Layout | None = None
    summed: bool = False

    @property
    def rows(self) -> int:
        """Rows of the matrix view."""
        return sum(rows for rows, _ in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return self.rows * self.cols * self.dtype.itemsize

    def is_everywhere(self) -> bool:
        """Whether every rank holds all of it."""
        return all(layout.is_everywhere() for _, layout in self.blocks)

    def saved_on(self, world_size: int) -> Layout:
        """The region of each rank in the saved form."""
        if self.saved is not None:
            return self.saved
        length = self.shape[0] if self.shape else 1
        return row_chunks(length, math.prod(self.shape[1:]), self.cols, world_size)


class LogicalState:
    """Converts state tensors of one group of ranks.

    Args:
        comm: The ranks that share the states.
        device: Device of the states in use.
    """

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self.comm = comm
        self.device = device
        self.exchange = Exchange(comm)
        self._mesh: DeviceMesh | None = None

    def save(
        self, tensors: Sequence[StateTensor], local: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """The saved form of state tensors; a collective.

        Args:
            tensors: What they are.
            local: This rank's entries of each block of each.

        Returns:
            DTensors sharded by rows, or plain full tensors on a single process. As in
            torch, they may share memory with the states.
        """
        pieces = self.save_pieces(tensors, local)
        return [self._wrap(tensor, rows) for tensor, rows in zip(tensors, pieces)]

    def save_pieces(
        self, tensors: Sequence[StateTensor], local: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """This rank's part of the saved form; a collective.

        Args:
            tensors: What they are.
            local: This rank's entries of each block of each.

        Returns:
            Tensors in the shape of this rank's region of the saved form.
        """
        saved: list[Tensor] = []
        for some in _chunks(tensors):
            pieces = [
                piece.reshape(layout[self.comm.rank].shape)
                for i in some
                for (_, layout), piece in zip(tensors[i].blocks, local[i], strict=True)
            ]
            moved = self._move([tensors[i] for i in some], pieces, back=False)
            # Blocks lie one under the other, and so do a rank's shares of them.
            for each in moved:
                held = [piece for piece in each if piece.numel()]
                saved.append(torch.cat(held) if len(held) > 1 else [*held, *each][0])
        return saved

    def load_pieces(
        self, tensors: Sequence[StateTensor], saved: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """The way back from `save_pieces`; a collective.

        Args:
            tensors: What is wanted, with the layout wanted.
            saved: This rank's part of the saved form of each.

        Returns:
            Of each a tensor for each block, in the shape of this rank's region and of
            the wanted dtype; one that did not move may be the one given.
        """
        local: list[list[Tensor]] = []
        for some in _chunks(tensors):
            pieces: list[Tensor] = []
            for i in some:
                piece = saved[i].to(self.device, tensors[i].dtype)
                pieces.extend(self._by_block(tensors[i], piece))
            local.extend(self._move([tensors[i] for i in some], pieces, back=True))
        return local

    def load(
        self, tensors: Sequence[StateTensor], saved: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """This rank's entries of saved state tensors; a collective.

        Args:
            tensors: What is wanted, with the layout wanted.
            saved: The saved form of each: a full tensor, or a DTensor of any placement.

        Returns:
            Of each a new tensor for each block, in the shape of this rank's region and
            of the wanted dtype.

        Raises:
            ValueError: If a shape is wrong; it names the parameter and both shapes.
        """
        for tensor, value in zip(tensors, saved):
            if tuple(value.shape) != tensor.shape:
                raise ValueError(
                    f"{tensor.name}: loaded state {tensor.key!r} has shape "
                    f"{tuple(value.shape)}, expected {tensor.shape}; load a state "
                    "that was saved for the same parameter"
                )
        local: list[list[Tensor]] = []
        for some in _chunks(tensors):
            rows = [
                piece
                for i in some
                for piece in self._by_block(
                    tensors[i], self._rows(tensors[i], saved[i])
                )
            ]
            moved = self._move([tensors[i] for i in some], rows, back=True)
            # A piece that did not move may still be the caller's memory.
            local.extend(
                [p.clone() if _shares(p, saved[i]) else p for p in each]
                for i, each in zip(some, moved)
            )
        return local

    def keep(self, value: Any) -> Any:
        """A saved value for later: a copy of this rank's share; no communication."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            return value.detach().clone()
        if self.comm.size == 1 or value.dim() == 0:
            return value.detach().to(self.device, copy=True)
        placement = [Shard(0)]
        return distribute_tensor(
            value.detach().to(self.device), self.mesh, placement, src_data_rank=None
        ).clone()

    def _move(
        self, tensors: Sequence[StateTensor], pieces: Sequence[Tensor], *, back: bool
    ) -> list[list[Tensor]]:
        """Between the regions of the plan and those of the saved form, by block."""
        hops, dtypes = [], []
        for t in tensors:
            for (_, layout), (_, saved) in zip(t.blocks, self._saved_blocks(t)):
                size = t.dtype.itemsize
                if back and t.summed:
                    layout = _on_first(layout)
                source, target = (saved, layout) if back else (layout, saved)
                summed = t.summed and not back
                hops.append(Move(t.cols, source, target, size, summed=summed))
                dtypes.append(t.dtype)
        plan = ExchangePlan(self.comm.size, tuple(hops))
        moved, _ = self.exchange.run(plan, pieces, dtypes, dtypes, device=self.device)
        each = iter(moved)
        return [[next(each) for _ in t.blocks] for t in tensors]

    def _saved_blocks(self, tensor: StateTensor) -> Iterator[tuple[int, Layout]]:
        """The first row of each block, and where the block lies in the saved form."""
        saved, top = tensor.saved_on(self.comm.size), 0
        for rows, _ in tensor.blocks:
            whole = len(tensor.blocks) == 1
            cut = saved if whole else cut_rows(saved, top, top + rows, tensor.cols)
            yield top, cut
            top += rows

    def _by_block(self, tensor: StateTensor, piece: Tensor) -> Iterator[Tensor]:
        """This rank's part of the saved form, cut into its shares of the blocks."""
        held = tensor.saved_on(self.comm.size)[self.comm.rank]
        flat = piece.reshape(-1)
        for top, cut in self._saved_blocks(tensor):
            region = cut[self.comm.rank]
            start = entries_above(held, top, tensor.cols)
            yield flat[start : start + region.numel].view(region.shape)

    def _wrap(self, tensor: StateTensor, rows: Tensor) -> Tensor:
        if self.comm.size == 1:
            return rows.reshape(tensor.shape)
        stride = torch.empty(tensor.shape, device="meta").stride()
        return DTensor.from_local(
            rows.reshape(-1, *tensor.shape[1:]),
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size(tensor.shape),
            stride=stride,
        )

    def _rows(self, tensor: StateTensor, value: Tensor) -> Tensor:
        """This rank's row chunk of a saved tensor."""
        chunk = tensor.saved_on(self.comm.size)[self.comm.rank]
        assert isinstance(chunk, Box)
        if isinstance(value, DTensor):
            if self.comm.size > 1 and self._is_ours(value):
                rows = value.to_local().reshape(chunk.shape)
                return rows.to(self.device, tensor.dtype)
            value = value.full_tensor()
        rows = value.reshape(tensor.rows, tensor.cols)[chunk.row_start : chunk.row_stop]
        return rows.to(self.device, tensor.dtype).contiguous()

    def _is_ours(self, value: DTensor) -> bool:
        """Whether a DTensor is sharded as `save` does it."""
        mesh = value.device_mesh
        same = mesh.ndim == 1 and torch.equal(mesh.mesh, self.mesh.mesh)
        return same and value.placements == (Shard(0),)

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks as a 1-D mesh."""
        if self._mesh is None:
            assert isinstance(self.comm, ProcessGroup)
            self._mesh = DeviceMesh.from_group(self.comm.group, self.device.type)
        return self._mesh


def row_chunks(length: int, inner: int, cols: int, world_size: int) -> Layout:
    """What each rank has under ``Shard(0)``: a chunk as ``torch.chunk`` makes them.

    Args:
        length: Length of the first dimension.
        inner: Product of the other dimensions.
        cols: Columns of the matrix view, which divide ``inner``.
        world_size: Number of ranks.

    Returns:
        Boxes of whole rows of the view.
    """
    size = -(-length // world_size)
    rows = inner // cols if cols else 0
    edges = [rows * min(size * i, length) for i in range(world_size + 1)]
    return Layout.of(Box(a, b, 0, cols) for a, b in zip(edges, edges[1:]))


def _chunks(tensors: Sequence[StateTensor]) -> Iterator[list[int]]:
    """Positions of tensors that are moved together."""
    some: list[int] = []
    size = 0
    for i, tensor in enumerate(tensors):
        if some and size + tensor.nbytes > CHUNK_BYTES:
            yield some
            some, size = [], 0
        some.append(i)
        size += tensor.nbytes
    if some:
        yield some


def _on_first(layout: Layout) -> Layout:
    """The first piece of a layout on the first of its ranks alone."""
    (region, ranks), *_ = layout.pieces
    first = region, alone(ranks[0])
    return Layout(layout.world_size, (first,), Box(0, 0, 0, region.shape[-1]))


def _shares(piece: Tensor, value: Tensor) -> bool:
    plain = value.to_local() if isinstance(value, DTensor) else value
    return (
        piece.numel() > 0
        and piece.untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()
    )


def as_column(layout: Layout) -> Layout:
    """Regions of a ``1 x n`` matrix as those of an ``n x 1`` matrix."""
    return Layout.of(
        Box(r.col_start, r.col_stop, 0, 1) if isinstance(r, Box) else r for r in layout
    )


def vector_layout(layout: Layout, *, of_rows: bool) -> Layout:
    """Regions of a row or column statistic, as a column of entries.

    Args:
        layout: Regions of the matrix's moments.
        of_rows: One entry per row rather than per column.

    Returns:
        Boxes of a ``length x 1`` matrix. A rank with no entry of the matrix but all of
        its rows (or columns) has the statistic nevertheless.
    """
    regions = []
    for region in layout:
        assert isinstance(region, Box)
        start, stop = (
            (region.row_start, region.row_stop)
            if of_rows
            else (region.col_start, region.col_stop)
        )
        regions.append(Box(start, stop, 0, 1))
    return Layout.of(regions)
