"""Matrices and rounds as a packing sees them."""

from __future__ import annotations

import dataclasses

from sharded_adadiag.plan.geometry import Layout, Ranks
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.regions import Box

# The blocks of one matrix in one round, by rank; None for all of it.
Blocks = dict[int, Box] | None


@dataclasses.dataclass(slots=True)
class Packing:
    """Rounds as they fill.

    Attributes:
        rounds: Of each, the blocks by position of the matrix.
        used: Bytes by rank and round.
        work: Multiply-adds by rank and round.
    """

    rounds: list[dict[int, Blocks]]
    used: list[list[int]]
    work: list[list[float]]

    @property
    def efficiency(self) -> float:
        """The mean rank's work over the sum of the rounds' most loaded ranks'."""
        busiest = sum(max(works) for works in zip(*self.work))
        mean = sum(map(sum, self.work)) / len(self.work)
        return mean / busiest if busiest else 1.0

    @property
    def evenness(self) -> float:
        """The mean rank's work over the most loaded rank's: no round can mend that."""
        works = [sum(work) for work in self.work]
        return sum(works) / len(works) / max(works) if any(works) else 1.0

    def add_round(self) -> None:
        """One more round, empty."""
        self.rounds.append({})
        for rank in range(len(self.used)):
            self.used[rank].append(0)
            self.work[rank].append(0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One matrix as a packing sees it.

    Attributes:
        position: In the list of matrices.
        blocks: What each rank works on.
        by_rows: The lines are rows.
        storage: Where the matrix is stored.
        line_bytes: What the rank that works on a line receives or sends for it.
        copies: Ranks that are sent the update of an entry.
        line_work: Multiply-adds of a step for one line.
        phase: Where a team of several begins in its blocks, as a share of them.
    """

    position: int
    blocks: tuple[tuple[Box, Ranks], ...]
    by_rows: bool
    storage: Layout
    line_bytes: int
    copies: int
    line_work: float
    phase: float

    @classmethod
    def of(cls, position: int, matrix: MatrixPlan, phase: float) -> Item:
        """The item of a matrix."""
        view, moments = matrix.view, matrix.route.moments
        by_rows = moments.split == "rows" or (matrix.right and not matrix.left)
        lines, length = view.rows, view.cols
        if not by_rows:
            lines, length = length, lines
        # Every holder of a piece is sent its update.
        copies = view.layout.copies
        moves = len(matrix.route.stages) > 1
        return cls(
            position,
            tuple((b, r) for b, r in moments.layout.pieces if isinstance(b, Box)),
            by_rows,
            view.layout,
            length * view.work_itemsize * copies * moves,
            copies,
            matrix.cost.step / lines,
            phase,
        )

    def lines(self, block: Box) -> int:
        """Lines of a block."""
        return block.shape[0 if self.by_rows else 1]

    def nbytes(self, block: Box) -> int:
        """Bytes that a rank sends or receives for a block."""
        return self.lines(block) * self.line_bytes

    def slice(self, block: Box, start: int, stop: int) -> Box:
        """Some lines of a block."""
        top, left = block.row_start, block.col_start
        if self.by_rows:
            return Box(top + start, top + stop, left, block.col_stop)
        return Box(top, block.row_stop, left + start, left + stop)
