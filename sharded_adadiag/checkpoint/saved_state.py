"""The engine's states in their saved form, and back."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from sharded_adadiag.checkpoint.logical import LogicalState, StateTensor, as_column
from sharded_adadiag.checkpoint.matrix_states import live_blocks, saved_tensors
from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.params.local import LocalParam, device_of, is_distributed, local
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.regions import FlatRange
from sharded_adadiag.step.states import specs_of


class SavedState:
    """Saves and loads the states of planned parameters.

    Args:
        entries: The parameters, with their states allocated.
        matrices: The plan of those that are seen as matrices.
        comm: The ranks that share them.
    """

    def __init__(
        self,
        entries: Sequence[LocalParam],
        matrices: Iterable[MatrixPlan],
        comm: Communicator,
    ) -> None:
        self.entries = entries
        self.logical = LogicalState(comm, device_of(entries))
        self.matrices: dict[int, list[MatrixPlan]] = {}
        for matrix in matrices:
            self.matrices.setdefault(matrix.index, []).append(matrix)
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
                if i in self.matrices:
                    saved[i][tensor.key] = None  # in this order
                    moving.append((i, tensor))
                    continue
                value = saved[i][tensor.key] = state[tensor.key]
                # What is a DTensor or whole on every rank is logical as it is.
                whole = tensor.nbytes == 0 or tensor.is_everywhere()
                if not (is_distributed(value) or whole):
                    moving.append((i, tensor))
        pieces = [self._live(i, t.key) for i, t in moving]
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
        self._take(wanted, pieces)

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
        live = [self._live(i, t.key) for i, t in tensors]
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
        self._take(wanted, pieces)

    def keys(self, i: int) -> set[str]:
        """What the saved form has of a parameter, besides the step count."""
        return {tensor.key for tensor in self._tensors(i)}

    def _take(
        self,
        wanted: Sequence[tuple[int, StateTensor]],
        pieces: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        """Copy what was loaded, block by block, into the live states."""
        for (i, tensor), blocks in zip(wanted, pieces):
            for live, piece in zip(self._live(i, tensor.key), blocks, strict=True):
                if tensor.summed and not piece.numel():
                    live.zero_()  # another rank has all of the sum
                else:
                    live.copy_(piece.view(live.shape))

    def _live(self, i: int, key: str) -> list[torch.Tensor]:
        """This rank's tensors of a saved tensor's blocks; views of the live state."""
        state = self.entries[i].state()
        plans = self.matrices.get(i)
        if plans is None:
            return [local(state[key])]
        return live_blocks(plans, state, key, self.logical.comm.rank)

    def _in_place(self, i: int, tensor: StateTensor) -> StateTensor:
        """With the parameter's own regions for its saved form, if it has its shape."""
        entry = self.entries[i]
        if tensor.shape != entry.spec.shape:
            return tensor
        if i not in self.matrices:
            ((_, layout),) = tensor.blocks
            return dataclasses.replace(tensor, saved=layout)
        cols = entry.spec.stored[1]
        assert tensor.cols == cols or isinstance(entry.region, FlatRange)
        return dataclasses.replace(tensor, saved=entry.layout)

    def _accepted(
        self, i: int, values: dict[str, Any], *, bases: str = "saved"
    ) -> list[StateTensor]:
        """What can be kept of a parameter's loaded state; says what cannot."""
        tensors = list(self._tensors(i))
        specs = specs_of(self.matrices.get(i, ()))
        # Without a basis on its way nothing is missing.
        late = {key for key, spec in specs.items() if spec.kept == "head"}
        missing = sorted(t.key for t in tensors if t.key not in {*values, *late})
        unknown = sorted(set(values) - {t.key for t in tensors} - {"step"})
        name = self.entries[i].spec.name
        if unknown:
            _warn(f"{name}: {', '.join(unknown)} of the loaded state was dropped")
        if any(key not in specs or specs[key].kept == "block" for key in missing):
            _warn(f"{name}: the loaded state has no {', '.join(missing)}; starts anew")
            return []
        if missing and bases == "saved":
            rotated = any(specs[key].kept == "copy" for key in missing)
            _warn(
                f"{name}: the loaded state has no {', '.join(missing)}; its "
                + (
                    "moments are taken to be unrotated until the next basis"
                    if rotated
                    else "averages start anew"
                )
            )
        return [tensor for tensor in tensors if tensor.key in values]

    def _tensors(self, i: int) -> Iterator[StateTensor]:
        """Everything kept for a parameter, but for its step count."""
        entry = self.entries[i]
        if i in self.matrices:
            plans, size = self.matrices[i], self.logical.comm.size
            yield from saved_tensors(entry.spec, plans, size)
            return
        shape = entry.spec.shape
        rows, cols = entry.spec.stored
        layout = entry.layout
        if len(shape) < 2:
            rows, cols, layout = math.prod(shape), 1, as_column(layout)
        for key, value in entry.state().items():
            if key != "step":
                blocks, name = ((rows, layout),), entry.spec.name
                yield StateTensor(name, key, shape, cols, blocks, value.dtype)


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
