"""Matrices that are updated together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sharded_adadiag.plan.matrices import MatrixPlan

if TYPE_CHECKING:
    from sharded_adadiag.step.engine import Engine

# Matrices of one shape are updated together up to this many elements: enough to
# keep a GPU busy, few enough to stay in a CPU's cache.
BATCH_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 26}
# Which matrices have a gradient may differ from step to step, so the batches of the
# sets that were met last are kept, not those of all.
SETS_KEPT = 64


class Batches:
    """The batches of any set of an engine's matrices.

    Args:
        engine: Whose matrices they are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kept = functools.lru_cache(SETS_KEPT)(self._make)

    def forget(self) -> None:
        """Parameters have changed groups."""
        self.kept.cache_clear()

    def of(self, matrices: Sequence[MatrixPlan]) -> list[list[MatrixPlan]]:
        """Matrices alike in shape, layout, options and dtype, some at a time.

        Args:
            matrices: Of one bucket.

        Returns:
            The batches, equal on every rank for equal matrices.
        """
        return self.kept(tuple(m.index for m in matrices))

    def _make(self, which: tuple[int, ...]) -> list[list[MatrixPlan]]:
        limit = BATCH_NUMEL.get(self.engine.device.type, BATCH_NUMEL["cuda"])
        planned = {m.index: m for m in self.engine.matrices}
        growing: dict[Any, list[MatrixPlan]] = {}
        full = []
        for m in (planned[i] for i in which):
            kind = (
                (m.view.rows, m.view.cols, m.left, m.right, m.work_dtype),
                id(self.engine.entries[m.index].group),
                m.route.stages if m.route.kind == "broadcast" else None,
            )
            batch = growing.setdefault(kind, [])
            batch.append(m)
            if (len(batch) + 1) * m.view.numel > limit:
                full.append(growing.pop(kind))
        return full + list(growing.values())
