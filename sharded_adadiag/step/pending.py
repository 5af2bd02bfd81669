"""Bases that are computed beside training, and waited for when they are due.

With ``refresh_lag=L`` the basis of the gradient of a matrix's step t is in force from
its step t + L on. Until then a worker thread computes it: torch lets go of Python's
lock in a decomposition. On a GPU it does so on a stream of its own. What comes of it is
put into the matrix's state at step t + L, or when the state is saved, whichever is
first, so that a run goes on alike from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.algorithm.basis import Basis
from sharded_adadiag.algorithm.spec import NEXT_ROTATIONS
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.step.bases import KnownBases
from sharded_adadiag.step.states import State, states_of


class _Work(NamedTuple):
    matrix: MatrixPlan
    position: int
    due: int
    basis: Future[Basis]


class PendingBases:
    """The bases that this rank is computing, or has computed and not used yet.

    Args:
        bases: Learns what came of them.

    Attributes:
        work: What they are, by the plan's key and the position in it.
    """

    def __init__(self, bases: KnownBases) -> None:
        self.bases = bases
        self.work: dict[tuple[tuple[int, int], int], _Work] = {}
        self.worker: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def begin(
        self,
        matrix: MatrixPlan,
        position: int,
        due: int,
        gathered: Mapping[str, Tensor],
        compute: Callable[[Mapping[str, Tensor]], Basis],
    ) -> None:
        """Begin to compute a basis.

        Args:
            matrix: The plan of the matrix, on the rank that computes its bases.
            position: Which of the plan's matrices.
            due: The matrix's step from which it is in force.
            gathered: What it is computed from; it is copied.
            compute: Computes it.
        """
        if self.worker is None:
            self.worker = ThreadPoolExecutor(1, "bases")
        own, stream = {k: value.clone() for k, value in gathered.items()}, None
        device = next(value.device for value in own.values())
        if device.type == "cuda":
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream(device))

        @torch.no_grad()
        def work() -> Basis:
            torch.get_num_threads()  # takes over what the main thread has set
            with torch.cuda.stream(stream):
                basis = compute(own)
            if stream is not None:
                stream.synchronize()
            return basis

        future = self.worker.submit(work)
        key = matrix.key, position
        self.work[key] = _Work(matrix, position, due, future)

    def broken(self, held: Sequence[dict[str, Any]]) -> dict[int, BaseException]:
        """Wait for what is due in the coming step, and tell what has failed.

        Args:
            held: The states of each parameter.

        Returns:
            Errors by position of the parameter.
        """
        found: dict[int, BaseException] = {}
        for work in self.work.values():
            index = work.matrix.index
            if held[index] and float(held[index]["step"]) + 1 >= work.due:
                error = work.basis.exception()
                if error is not None:
                    found[index] = error
        return found

    def put(self, matrix: MatrixPlan, position: int, state: State) -> None:
        """Wait for a basis and put it into the state, where it is saved and used.

        Args:
            matrix: The plan.
            position: Which of the plan's matrices.
            state: Its state. Zeros stand for: there is no new basis.
        """
        work = self.work.get((matrix.key, position))
        if work is None:
            return
        basis = work.basis.result()
        del self.work[matrix.key, position]
        self.bases.note(matrix, position, basis)
        for key, side in zip(NEXT_ROTATIONS, (basis.left, basis.right)):
            if key not in state:
                continue
            if side is None:
                state[key].zero_()
                continue
            if side.is_cuda:  # made on the other stream
                side.record_stream(torch.cuda.current_stream(side.device))
            state[key].copy_(side)

    def put_all(self, held: Sequence[dict[str, Any]]) -> None:
        """Put everything into the states, as before they are saved.

        Args:
            held: The states of each parameter; empty for one that has left.
        """
        for work in list(self.work.values()):
            state = held[work.matrix.index]
            if state:
                each = states_of(work.matrix, state)
                self.put(work.matrix, work.position, each[work.position])

    def forget(self) -> None:
        """The states have been replaced: what is on its way is no longer wanted."""
        for work in self.work.values():
            work.basis.cancel()
        self.work.clear()
