"""What a matrix costs: arithmetic per step, per refresh, and bytes of state.

Costs are in multiply-adds of a large float32 product on one CPU core. The constants
of a decomposition were fitted to measured times (thin SVD of 512 x 1376 120 ms, of
512 x 512 43 ms; eigh of the float64 Gram matrix 51 and 40 ms; beside a float32
product at 100 GFLOP/s); only ratios between matrices matter to the plan.
"""

from __future__ import annotations

import dataclasses

from sharded_adadiag.plan.schedule import Slots

# An entry-wise pass over the moments costs about as much as this many
# multiply-adds for each entry.
ELEMENTWISE = 40


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixCost:
    """Work and state of one matrix.

    Attributes:
        step: Multiply-adds of an ordinary step.
        refresh: Multiply-adds of one refresh of the basis.
        refresh_every: Steps between refreshes; None if it is never refreshed.
        state_bytes: Bytes of moments and rotations.
        slots: When it is refreshed.
    """

    step: int
    refresh: int
    refresh_every: int | None
    state_bytes: int
    slots: Slots = Slots.one(1)

    @property
    def per_step(self) -> float:
        """Step plus the refresh spread over its period."""
        share = self.refresh / self.refresh_every if self.refresh_every else 0.0
        return self.step + share


def step_cost(rows: int, cols: int, *, left: bool, right: bool) -> int:
    """Multiply-adds of one step: rotate, update the moments, rotate back."""
    dims = (rows if left else 0) + (cols if right else 0)
    return rows * cols * (2 * dims + ELEMENTWISE)


def refresh_cost(rows: int, cols: int, *, left: bool, right: bool, basis: str) -> int:
    """Multiply-adds of one decomposition.

    Args:
        rows: Number of rows of the matrix.
        cols: Number of columns of the matrix.
        left: Whether P is computed.
        right: Whether Q is computed.
        basis: ``"svd"`` or ``"eigh"``.

    Returns:
        The cost; 0 if no side is rotated.
    """
    sides = [k for k, wanted in ((rows, left), (cols, right)) if wanted]
    if not sides:
        return 0
    if basis == "eigh":
        return sum(2 * rows * cols * k + 15 * k**3 for k in sides)
    short, long = sorted((rows, cols))
    null_space = long**3 // 2 if max(sides) > short else 0
    return 16 * short * short * long + null_space
