"""Which matrices have a basis, and what is said when a decomposition fails.

A matrix whose rotation is the identity has no basis yet: nothing else is stored, so a
checkpoint from before the first basis goes on as the run that wrote it would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from sharded_adadiag.algorithm.basis import Basis
from sharded_adadiag.algorithm.update import lacks_basis


class KnownBases:
    """Remembers which matrices have a basis, so that an ordinary step reads none."""

    def __init__(self) -> None:
        self._there: set[int] = set()
        self._warned: set[tuple[str, str]] = set()

    def forget(self) -> None:
        """The states have been replaced: which matrices have a basis is unknown."""
        self._there.clear()

    def lacks(self, index: int, state: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether a matrix has no basis yet.

        Args:
            index: Position of its parameter.
            state: Gives its state, which is read once after a load.

        Returns:
            True until a gradient that is not zero has made the first basis.
        """
        if index not in self._there:
            held = {k: v for k, v in state().items() if k != "step"}
            if lacks_basis(held):
                return True
            self._there.add(index)
        return False

    def note(self, index: int, name: str, basis: Basis) -> None:
        """Note the outcome of a decomposition; a fallback is warned of once.

        Args:
            index: Position of the matrix's parameter.
            name: Its name.
            basis: What came of it.
        """
        if basis.made:
            self._there.add(index)
        if not basis.fallback or (name, basis.fallback) in self._warned:
            return
        self._warned.add((name, basis.fallback))
        took = "eigh was used" if basis.fallback == "eigh" else "the old basis was kept"
        warnings.warn(
            f"{name}: the decomposition of its gradient did not converge; {took}",
            RuntimeWarning,
            stacklevel=2,
        )
