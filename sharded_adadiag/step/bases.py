"""When a matrix gets a new basis, and what is said of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sharded_adadiag.algorithm.basis import Basis
from sharded_adadiag.algorithm.update import lacks_basis
from sharded_adadiag.options import Options
from sharded_adadiag.plan.matrices import MatrixPlan

if TYPE_CHECKING:
    from sharded_adadiag.step.engine import Engine


class Bases:
    """The bases of an engine's matrices.

    A matrix whose rotation is the identity has none yet: nothing else is stored, so a
    checkpoint of before the first basis goes on as the run it is of.

    Args:
        engine: Whose matrices they are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._there: set[int] = set()  # matrices known to have one
        self._warned: set[tuple[str, str]] = set()

    def look_again(self) -> None:
        """The states are others: which matrices have a basis is to be seen."""
        self._there.clear()

    def due(self, matrix: MatrixPlan, options: dict[int, Options]) -> bool:
        """Whether this step computes a new basis.

        It does on steps 1, T + 1, 2T + 1, ..., and on every step until a gradient that
        is not zero has made the first one.

        Args:
            matrix: Of which this rank holds the rotations.
            options: Of each group, by its identity.

        Returns:
            The same on every rank that may be asked.
        """
        if not matrix.rotated:
            return False
        since_first = self.engine.time_of(matrix) - 1
        period = self.engine.options_of(matrix, options).refresh_every
        if since_first == 0 or (period is not None and since_first % period == 0):
            return True
        # An ordinary step reads no rotation back: this is once after a load.
        if matrix.index not in self._there:
            if lacks_basis(self.engine.state_of(matrix)):
                return True
            self._there.add(matrix.index)
        return False

    def note(self, matrix: MatrixPlan, basis: Basis) -> None:
        """Take note of what came of a basis that was due.

        Args:
            matrix: The matrix.
            basis: Its basis; a fallback is warned of, once for each matrix.
        """
        if basis.made:
            self._there.add(matrix.index)
        name, fallback = matrix.view.name, basis.fallback
        if not fallback or (name, fallback) in self._warned:
            return
        self._warned.add((name, fallback))
        took = "eigh was used" if fallback == "eigh" else "the old basis was kept"
        warnings.warn(
            f"{name}: the decomposition of its gradient did not converge; {took}",
            RuntimeWarning,
            stacklevel=2,
        )
