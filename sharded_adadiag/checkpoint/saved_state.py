"""The engine's states in their saved form, and back."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from sharded_adadiag.algorithm.matrixize import matrix_shape
from sharded_adadiag.checkpoint.logical import (
    LogicalState,
    StateTensor,
    as_column,
    vector_layout,
)
from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.params.entry import Entry, device_of
from sharded_adadiag.params.local import is_distributed, local
from sharded_adadiag.plan.geometry import Layout, on_team
from sharded_adadiag.plan.matrices import MatrixPlan


class SavedState:
    """Saves and loads the states of planned parameters.

    Args:
        entries: The parameters, with their states allocated.
        matrices: The plan of those that are seen as matrices.
        comm: The ranks that share them.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        matrices: Iterable[MatrixPlan],
        comm: Communicator,
    ) -> None:
        self.entries = entries
        self.logical = LogicalState(comm, device_of(entries))
        self.matrices = {matrix.index: matrix for matrix in matrices}
        # What has left the param groups is no part of the saved form.
        self.members = [i for i, entry in enumerate(entries) if entry.member]

    def save(self) -> dict[int, dict[str, Any]]:
        """Every state in logical form; a collective."""
        saved: dict[int, dict[str, Any]] = {}
        moving: list[tuple[int, StateTensor]] = []
        for i in self.members:
            state = self.entries[i].state()
            saved[i] = {"step": state["step"]}
            for tensor in self._tensors(i):
                value = state[tensor.key]
                saved[i][tensor.key] = value
                # What is a DTensor or whole on every rank is logical as it is.
                whole = tensor.nbytes == 0 or tensor.layout.is_everywhere()
                if i in self.matrices or not (is_distributed(value) or whole):
                    moving.append((i, tensor))
        pieces = [self.entries[i].state()[t.key] for i, t in moving]
        values = self.logical.save([t for _, t in moving], pieces)
        for (i, tensor), value in zip(moving, values):
            saved[i][tensor.key] = value
        return saved

    def load(self, saved: dict[int, dict[str, Any]], *, partial: bool = False) -> None:
        """Take over a logical state; a collective.

        Args:
            saved: By position of the parameter.
            partial: It need not have every parameter.
        """
        # From a flattened checkpoint torch makes empty dicts of keys that it lacks.
        saved = {
            i: {key: value for key, value in values.items() if not _is_empty(value)}
            for i, values in saved.items()
        }
        everyone = self.members if saved and not partial else ()
        for i in sorted(set(everyone) - set(saved)):
            name = self.entries[i].spec.name
            _warn(f"{name}: the loaded state has nothing of it; starts anew")
        wanted: list[tuple[int, StateTensor]] = []
        for i, values in saved.items():
            accepted = self._accepted(i, values)
            wanted.extend((i, tensor) for tensor in accepted)
            if accepted and "step" in values:
                step = self.entries[i].state()["step"]
                step.fill_(float(values["step"]))
        tensors = [t for _, t in wanted]
        pieces = self.logical.load(tensors, [saved[i][t.key] for i, t in wanted])
        for (i, tensor), piece in zip(wanted, pieces):
            live = local(self.entries[i].state()[tensor.key])
            live.copy_(piece.view(live.shape))

    def save_pieces(self) -> dict[int, dict[str, torch.Tensor]]:
        """This rank's part of every state; a collective.

        Returns:
            By position of the parameter: tensors of the parameter's shape in the
            parameter's own regions, others in even shares of their rows.
        """
        tensors = [
            (i, self._in_place(i, tensor))
            for i in self.members
            for tensor in self._tensors(i)
        ]
        live = [local(self.entries[i].state()[t.key]) for i, t in tensors]
        pieces = self.logical.save_pieces([t for _, t in tensors], live)
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for (i, tensor), piece in zip(tensors, pieces):
            saved.setdefault(i, {})[tensor.key] = piece
        return saved

    def load_pieces(
        self, saved: dict[int, dict[str, torch.Tensor]], *, bases: str = "saved"
    ) -> None:
        """Take over what `save_pieces` gave; a collective.

        Args:
            saved: By position of the parameter; ``step`` too.
            bases: ``"due"`` if the caller has seen to missing rotations.
        """
        wanted: list[tuple[int, StateTensor]] = []
        for i, values in saved.items():
            accepted = self._accepted(i, values, bases=bases)
            wanted.extend((i, self._in_place(i, tensor)) for tensor in accepted)
            if accepted and "step" in values:
                self.entries[i].state()["step"].fill_(float(values["step"]))
        pieces = self.logical.load_pieces(
            [t for _, t in wanted], [saved[i][t.key] for i, t in wanted]
        )
        for (i, tensor), piece in zip(wanted, pieces):
            live = local(self.entries[i].state()[tensor.key])
            live.copy_(piece.view(live.shape))

    def _in_place(self, i: int, tensor: StateTensor) -> StateTensor:
        """With the parameter's own regions for its saved form, if it has its shape."""
        entry = self.entries[i]
        if tensor.shape != entry.spec.shape:
            return tensor
        layout = entry.layout if i in self.matrices else tensor.layout
        return dataclasses.replace(tensor, saved=layout)

    def _accepted(
        self, i: int, values: dict[str, Any], *, bases: str = "saved"
    ) -> list[StateTensor]:
        """What can be kept of a parameter's loaded state; says what cannot."""
        tensors = list(self._tensors(i))
        missing = sorted(t.key for t in tensors if t.key not in values)
        unknown = sorted(set(values) - {t.key for t in tensors} - {"step"})
        name = self.entries[i].spec.name
        if unknown:
            _warn(f"{name}: {', '.join(unknown)} of the loaded state was dropped")
        if any(not key.startswith("rotation") for key in missing):
            _warn(f"{name}: the loaded state has no {', '.join(missing)}; starts anew")
            return []
        if missing and bases == "saved":
            _warn(
                f"{name}: the loaded state has no {', '.join(missing)}; its moments "
                "are taken to be unrotated until the next basis"
            )
        return [tensor for tensor in tensors if tensor.key in values]

    def _tensors(self, i: int) -> Iterator[StateTensor]:
        """Everything kept for a parameter, but for its step count."""
        entry = self.entries[i]
        if i in self.matrices:
            yield from self._matrix_tensors(self.matrices[i])
            return
        shape = entry.spec.shape
        rows, cols = matrix_shape(shape)
        layout = entry.layout
        if len(shape) < 2:
            rows, cols, layout = math.prod(shape), 1, as_column(layout)
        for key, value in entry.state().items():
            if key != "step":
                yield StateTensor(
                    entry.spec.name, key, shape, rows, cols, layout, value.dtype
                )

    def _matrix_tensors(self, m: MatrixPlan) -> Iterator[StateTensor]:
        shape = self.entries[m.index].spec.shape
        moments = m.route.moments.layout
        rows, cols = m.view.rows, m.view.cols
        for key, dims in m.moments.items():
            if dims == ("m", "n"):
                yield self._tensor(m, key, shape, (rows, cols), moments)
            else:
                of_rows = dims == ("m",)
                length = rows if of_rows else cols
                layout = vector_layout(moments, of_rows=of_rows)
                yield self._tensor(m, key, (length,), (length, 1), layout)
        for key, wanted, k in (
            ("rotation_left", m.left, rows),
            ("rotation_right", m.right, cols),
        ):
            if wanted:
                layout = on_team(m.route.team, k, k, self.logical.comm.size)
                yield self._tensor(m, key, (k, k), (k, k), layout)

    def _tensor(
        self,
        m: MatrixPlan,
        key: str,
        shape: tuple[int, ...],
        view: tuple[int, int],
        layout: Layout,
    ) -> StateTensor:
        rotation = key.startswith("rotation")
        dtype: torch.dtype = m.rotation_dtype if rotation else m.moment_dtype
        return StateTensor(m.view.name, key, shape, *view, layout, dtype)


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
