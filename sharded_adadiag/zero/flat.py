"""States in the saved form of DeepSpeed: flat tensors, and what does not fit them.

DeepSpeed saves ``optimizer.state`` rank by rank and knows 1-D tensors as long as the
flat tensor they belong to. So moments of a parameter's shape are saved as the flat
``exp_avg`` and ``exp_avg_sq``, which its universal checkpoints understand, and
everything else (bases, factored moments, step counts) by parameter name in a dict
beside them, which they leave alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_adadiag.checkpoint.saved_state import SavedState
from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.params.local import LocalParam
from sharded_adadiag.step.engine import Engine
from sharded_adadiag.step.states import specs_of
from sharded_adadiag.zero import partitions as zero
from sharded_adadiag.zero.partitions import STATE_KEY, Fragment

FLAT_KEYS = ("exp_avg", "exp_avg_sq")


class FlatStates:
    """The flat tensors of an optimizer, and the parameters that each holds.

    Args:
        optimizer: The optimizer whose ``state`` has the flat tensors as keys.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._parts: dict[Tensor, list[tuple[Fragment, int]]] = {}
        self._unverified: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(
        self, flat: Tensor, fragments: list[Fragment], places: Sequence[int]
    ) -> None:
        """Note the parameters of a flat tensor and their positions in the engine."""
        self._parts[flat] = list(zip(fragments, places))
        self._unverified.append(flat)

    def verify(self, comm: Communicator) -> None:
        """Make sure, before the first step, that weights are where the map says.

        Not earlier: while a checkpoint is loaded the model's weights are ahead of
        DeepSpeed's own. A collective if there are new flat tensors.

        Args:
            comm: The ranks that share the parameters.

        Raises:
            ValueError: On every rank, naming the parameter.
        """
        if not self._unverified:
            return
        problems = [
            zero.misplaced([part for part, _ in self._parts[flat]], flat)
            for flat in self._unverified
        ]
        for rank, found in enumerate(comm.all_gather_object(problems)):
            for problem in filter(None, found):
                raise ValueError(f"rank {rank}: {problem}")
        self._unverified = []

    def stored(self, engine: Engine) -> Iterator[tuple[Tensor, LocalParam]]:
        """The model's copy of each parameter's entries, and the parameter."""
        for parts in self._parts.values():
            for part, i in parts:
                yield part.stored, engine.entries[i]

    def save(self, engine: Engine) -> dict[Tensor, dict[str, Any]]:
        """The saved form of the state of each flat tensor; a collective."""
        pieces = SavedState(
            engine.entries, engine.plan.matrices, engine.comm
        ).save_pieces()
        return {
            flat: self._saved(flat, parts, engine, pieces)
            for flat, parts in self._parts.items()
        }

    def load(self, engine: Engine, saved: dict[Tensor, dict[str, Any]]) -> None:
        """Load what `save` gave; a collective.

        Args:
            engine: The optimizer's engine, with a state for every parameter.
            saved: The saved form of the state of each flat tensor.
        """
        values: dict[int, dict[str, Tensor]] = {}
        states = SavedState(engine.entries, engine.plan.matrices, engine.comm)
        for flat, state in saved.items():
            for part, i in self._parts.get(flat, ()):
                own = state.get(STATE_KEY, {}).get(part.name, {})
                fits = {key: part.of(state[key]) for key in FLAT_KEYS if key in state}
                wanted = states.keys(i)
                values[i] = {k: v for k, v in fits.items() if k in wanted} | own
        states.load_pieces(values)
        engine.mark_loaded()

    def absorb(self, engine: Engine) -> None:
        """Load flat states that a universal checkpoint has left; a collective.

        Such a checkpoint has no bases. The next gradient that is not zero makes them,
        as it makes first ones, and the moments are carried over.

        Args:
            engine: The optimizer's engine, with a state for every parameter.
        """
        states = self.optimizer.state
        left = [flat for flat in self._parts if FLAT_KEYS[0] in states[flat]]
        values: dict[int, dict[str, Tensor]] = {}
        rotated = {m.index for m in engine.plan.matrices if m.rotated}
        saved = SavedState(engine.entries, engine.plan.matrices, engine.comm)
        for flat in left:
            state = states[flat]
            for part, i in self._parts[flat]:
                live = engine.entries[i].state()
                wanted = saved.keys(i)
                fits = {k: part.of(state[k]) for k in FLAT_KEYS if k in wanted}
                step = torch.as_tensor(float(state.get("step", 0)))
                values[i] = {**fits, "step": step}
                for key, spec in specs_of(saved.matrices.get(i, ())).items():
                    # The identity stands for a basis that is yet to come.
                    if spec.kept != "block" and live[key].numel() > 0:
                        spec.begin(live[key])
            for key in [key for key in state if key != STATE_KEY]:
                del state[key]
        if left:
            saved.load_pieces(values, bases="due")
            engine.mark_loaded()
            warnings.warn(
                f"the universal checkpoint has no bases: those of "
                f"{len(rotated & set(values))} matrices are computed at the next step",
                UserWarning,
                stacklevel=2,
            )

    def _saved(
        self,
        flat: Tensor,
        parts: list[tuple[Fragment, int]],
        engine: Engine,
        pieces: dict[int, dict[str, Tensor]],
    ) -> dict[str, Any]:
        vectors = {key: torch.zeros_like(flat.detach()) for key in FLAT_KEYS}
        rest: dict[str, dict[str, Tensor]] = {}
        steps = [torch.tensor(0.0)]
        for part, i in parts:
            steps.append(engine.entries[i].state()["step"])
            own = rest[part.name] = {"step": steps[-1]}
            for key, value in pieces.get(i, {}).items():
                narrow = value.dtype.itemsize <= flat.dtype.itemsize
                if key in vectors and narrow:
                    part.of(vectors[key]).copy_(value.reshape(-1))
                else:
                    own[key] = value
        return {"step": max(steps, key=float).clone(), **vectors, STATE_KEY: rest}
