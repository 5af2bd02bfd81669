"""Which matrices have a basis, and what is said when a decomposition fails.

A matrix whose rotation is the identity has no basis yet: nothing else is stored, so a
checkpoint from before the first basis goes on as the run that wrote it would.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from sharded_adadiag.algorithm.basis import Basis
from sharded_adadiag.algorithm.update import lacks_basis
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.step.states import states_of


class KnownBases:
    """Remembers which matrices have a basis, so that an ordinary step reads none.

    Attributes:
        complete: Keys of plans all of whose matrices are known to have one.
    """

    def __init__(self) -> None:
        # Of each plan, by its key, those of its matrices.
        self._there: dict[tuple[int, int], set[int]] = {}
        self._read: set[tuple[int, int]] = set()
        self.complete: set[tuple[int, int]] = set()
        self._warned: set[tuple[str, str]] = set()

    def forget(self) -> None:
        """The states have been replaced: which matrices have a basis is unknown."""
        self._there.clear()
        self._read.clear()
        self.complete.clear()

    def lacking(self, matrix: MatrixPlan, state: Mapping[str, Any]) -> list[int]:
        """Which matrices of a plan have no basis until a gradient that is not zero.

        Args:
            matrix: The plan, of matrices that this rank works on.
            state: The state of the parameter, which is read once after a load.

        Returns:
            Their positions in the plan.
        """
        there = self._there.setdefault(matrix.key, set())
        if len(there) == matrix.share.count:
            self.complete.add(matrix.key)
            return []
        if matrix.key not in self._read:
            self._read.add(matrix.key)
            for i, held in enumerate(states_of(matrix, state)):
                if i not in there and not lacks_basis(held):
                    there.add(i)
        return [i for i in range(matrix.share.count) if i not in there]

    def note(self, matrix: MatrixPlan, position: int, basis: Basis) -> None:
        """Note the outcome of a decomposition; a fallback is warned of once.

        Args:
            matrix: The plan.
            position: Which of the plan's matrices.
            basis: What came of it.
        """
        if basis.made:
            self._there.setdefault(matrix.key, set()).add(position)
        name = matrix.name(position)
        if not basis.fallback or (name, basis.fallback) in self._warned:
            return
        self._warned.add((name, basis.fallback))
        took = "eigh was used" if basis.fallback == "eigh" else "the old basis was kept"
        warnings.warn(
            f"{name}: the decomposition of its gradient did not converge; {took}",
            RuntimeWarning,
            stacklevel=2,
        )
