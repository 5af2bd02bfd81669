"""State tensors between the place where they are used and their saved form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_adadiag.comm.collectives import Communicator, ProcessGroup
from sharded_adadiag.comm.exchange import Exchange
from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import Box, Layout

# Bytes of full state tensors moved at once: bounds the memory of saving.
CHUNK_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, slots=True)
class StateTensor:
    """One state tensor and where its entries are.

    Attributes:
        name: Of the parameter.
        key: Of the state.
        shape: The logical shape in the saved form.
        rows: Of the matrix view in which the regions are given.
        cols: Of that view.
        layout: The region of each rank.
        dtype: Of the tensor.
        saved: The region of each rank in the saved form; None is an even share of
            the rows.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    rows: int
    cols: int
    layout: Layout
    dtype: torch.dtype
    saved: Layout | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return self.rows * self.cols * self.dtype.itemsize


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
        self, tensors: Sequence[StateTensor], local: Sequence[Tensor]
    ) -> list[Tensor]:
        """The saved form of state tensors; a collective.

        Args:
            tensors: What they are.
            local: This rank's entries of each, in the shape of its region.

        Returns:
            DTensors sharded by rows, or plain full tensors on a single process. As in
            torch, they may share memory with the states.
        """
        pieces = self.save_pieces(tensors, local)
        return [self._wrap(tensor, rows) for tensor, rows in zip(tensors, pieces)]

    def save_pieces(
        self, tensors: Sequence[StateTensor], local: Sequence[Tensor]
    ) -> list[Tensor]:
        """This rank's part of the saved form; a collective.

        Args:
            tensors: What they are.
            local: This rank's entries of each, in the shape of its region.

        Returns:
            Tensors in the shape of this rank's region of the saved form.
        """
        saved: list[Tensor] = []
        for some in _chunks(tensors):
            pieces = [
                local[i].reshape(tensors[i].layout[self.comm.rank].shape) for i in some
            ]
            saved.extend(self._move([tensors[i] for i in some], pieces, back=False))
        return saved

    def load_pieces(
        self, tensors: Sequence[StateTensor], saved: Sequence[Tensor]
    ) -> list[Tensor]:
        """The way back from `save_pieces`; a collective.

        Args:
            tensors: What is wanted, with the layout wanted.
            saved: This rank's part of the saved form of each.

        Returns:
            Tensors in the shape of this rank's regions, of the wanted dtype; one that
            did not move may be the one given.
        """
        local: list[Tensor] = []
        for some in _chunks(tensors):
            pieces = []
            for i in some:
                region = self._saved(tensors[i])[self.comm.rank]
                piece = saved[i].to(self.device, tensors[i].dtype)
                pieces.append(piece.reshape(region.shape))
            local.extend(self._move([tensors[i] for i in some], pieces, back=True))
        return local

    def load(
        self, tensors: Sequence[StateTensor], saved: Sequence[Tensor]
    ) -> list[Tensor]:
        """This rank's entries of saved state tensors; a collective.

        Args:
            tensors: What is wanted, with the layout wanted.
            saved: The saved form of each: a full tensor, or a DTensor of any placement.

        Returns:
            New tensors in the shape of this rank's regions, of the wanted dtype.

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
        local: list[Tensor] = []
        for some in _chunks(tensors):
            rows = [self._rows(tensors[i], saved[i]) for i in some]
            moved = self._move([tensors[i] for i in some], rows, back=True)
            # A piece that did not move may still be the caller's memory.
            local.extend(
                piece.clone() if _shares(piece, saved[i]) else piece
                for i, piece in zip(some, moved)
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
    ) -> list[Tensor]:
        """Between the regions of the plan and row chunks."""
        hops = []
        for t in tensors:
            ends = t.layout, self._saved(t)
            source, target = reversed(ends) if back else ends
            hops.append(Move(t.cols, source, target, t.dtype.itemsize))
        plan = ExchangePlan(self.comm.size, tuple(hops))
        dtypes = [t.dtype for t in tensors]
        return self.exchange.run(plan, pieces, dtypes, dtypes, device=self.device)[0]

    def _saved(self, tensor: StateTensor) -> Layout:
        return tensor.saved or row_chunks(tensor.rows, tensor.cols, self.comm.size)

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
        chunk = row_chunks(tensor.rows, tensor.cols, self.comm.size)[self.comm.rank]
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


def row_chunks(rows: int, cols: int, world_size: int) -> Layout:
    """The rows of each rank under ``Shard(0)``: ``torch.chunk``'s."""
    size = -(-rows // world_size)
    edges = [min(size * i, rows) for i in range(world_size + 1)]
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
