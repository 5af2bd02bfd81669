"""One matrix as the framework distributes it."""

from __future__ import annotations

import dataclasses
import enum
import functools

from sharded_adadiag.plan.geometry import Layout, tiling_error
from sharded_adadiag.plan.regions import Box


class Storage(enum.Enum):
    """How a matrix lies on the ranks."""

    REPLICATED = "replicated"
    """Every rank holds all of it."""
    ROWS = "row blocks"
    """Whole rows on each rank."""
    COLS = "column blocks"
    """Whole columns on each rank."""
    PIECES = "pieces"
    """Anything else: flat ranges, rectangles."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixLayout:
    """The matrix view of one parameter and where its entries are.

    Attributes:
        name: The parameter's name, for messages.
        rows: Number of rows of the full matrix.
        cols: Number of columns of the full matrix.
        layout: The region of each rank.
        grad_itemsize: Bytes of one gradient element.
        work_itemsize: Bytes of one element of the computation and of the update.
    """

    name: str
    rows: int
    cols: int
    layout: Layout
    grad_itemsize: int = 4
    work_itemsize: int = 4

    def __post_init__(self) -> None:
        error = _tiling_error(self.layout, self.rows, self.cols)
        if error is not None:
            raise ValueError(
                f"{self.name}: the ranks' pieces do not make up the "
                f"{self.rows} x {self.cols} matrix: {error}; pass the process group "
                "that spans all ranks that hold a piece"
            )

    @property
    def numel(self) -> int:
        """Entries of the full matrix."""
        return self.rows * self.cols

    @property
    def storage(self) -> Storage:
        """How the matrix lies on the ranks."""
        return _storage(self.layout, self.rows, self.cols)


# A model repeats a few shapes in a few layouts many times.
_tiling_error = functools.lru_cache(maxsize=64)(tiling_error)


@functools.lru_cache(maxsize=64)
def _storage(layout: Layout, rows: int, cols: int) -> Storage:
    pieces = [region for region, _ in layout.pieces]
    if layout.is_everywhere():
        return Storage.REPLICATED
    if all(isinstance(p, Box) and p.shape[1] == cols for p in pieces):
        return Storage.ROWS
    if all(isinstance(p, Box) and p.shape[0] == rows for p in pieces):
        return Storage.COLS
    return Storage.PIECES
