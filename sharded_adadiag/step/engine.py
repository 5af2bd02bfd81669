"""Runs a step: agree, gather, update, scatter, apply.

The engine holds the plan and the tensors it speaks of. It knows no framework (it
gets regions and plain local tensors) and no formula (it calls `algorithm`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.algorithm.basis import Basis
from sharded_adadiag.algorithm.state import Rule, plain_moments
from sharded_adadiag.algorithm.update import update
from sharded_adadiag.checkpoint.saved_state import SavedState
from sharded_adadiag.comm.collectives import Communicator
from sharded_adadiag.comm.exchange import Exchange
from sharded_adadiag.options import Options
from sharded_adadiag.params.entry import Entry
from sharded_adadiag.params.exclusion import LOPSIDED
from sharded_adadiag.params.local import local
from sharded_adadiag.plan.buckets import Bucket, make_buckets
from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.matrices import MatrixPlan, plan_matrices
from sharded_adadiag.plan.refresh import refresh_plans
from sharded_adadiag.plan.report import Report, make_report
from sharded_adadiag.step.agreement import Agreement
from sharded_adadiag.step.bases import Bases
from sharded_adadiag.step.batching import Batches
from sharded_adadiag.step.blocks import BlockUpdates
from sharded_adadiag.step.group_options import GroupOptions
from sharded_adadiag.step.plain import plain_update

logger = logging.getLogger("sharded_adadiag")


class Engine:
    """The plan of an optimizer and the machinery that carries it out.

    Args:
        method: The optimizer.
        comm: The ranks that share the parameters.
        distribution: ``"auto"``, ``"owner"`` or ``"broadcast"``.
    """

    def __init__(self, method: Rule, comm: Communicator, distribution: str) -> None:
        self.method = method
        self.comm = comm
        self.distribution = distribution
        self.exchange = Exchange(comm)
        self.entries: list[Entry] = []
        self.matrices: list[MatrixPlan] = []
        self.buckets: list[Bucket] = []
        self.group_options = GroupOptions(self)
        self.agreement = Agreement(self)
        self._blocks = BlockUpdates(self)
        self.bases = Bases(self)
        self.batches = Batches(self)
        self._computing = 0

    def extend(self, entries: Sequence[Entry]) -> None:
        """Plan further parameters; those planned before keep their owners and state.

        Args:
            entries: The new parameters.
        """
        matrices = plan_matrices(
            [entry.spec for entry in entries],
            [entry.layout for entry in entries],
            method=self.method,
            world_size=self.comm.size,
            distribution=self.distribution,
            first_index=len(self.entries),
            planned=self.matrices,
        )
        self.entries.extend(entries)
        self.matrices.extend(matrices)
        if self.comm.rank == 0:
            _warn_of_lopsided(matrices)
        self.buckets.extend(make_buckets(matrices, self.comm.size))
        self.group_options.forget()

    def members(self) -> list[MatrixPlan]:
        """The matrices that are in a param group."""
        return [m for m in self.matrices if self.entries[m.index].member]

    def regroup(self) -> None:
        """Take note that parameters left, came back, or changed groups."""
        members = self.members()
        bucketed = {m.index for bucket in self.buckets for m in bucket.matrices}
        if bucketed != {m.index for m in members}:
            self.buckets = make_buckets(members, self.comm.size)
        self.batches.forget()
        self.group_options.forget()

    def allocate(self) -> None:
        """Create every state tensor that is missing, with the same keys on all ranks.

        Raises:
            ValueError: If an unpickled state tensor has another shape than planned.
        """
        planned = {matrix.index: matrix for matrix in self.matrices}
        for i, entry in enumerate(self.entries):
            if not entry.member:
                continue
            state = entry.state()
            state.setdefault("step", torch.tensor(0.0))
            matrix = planned.get(i)
            if matrix is None:
                self._allocate_plain(entry, state)
                continue
            for key, (shape, dtype) in matrix.state_shapes(self.comm.rank).items():
                device = entry.param.device
                if key not in state:
                    state[key] = torch.zeros(shape, dtype=dtype, device=device)
                    if key.startswith("rotation") and 0 not in shape:
                        state[key].fill_diagonal_(1.0)  # until the first basis
                elif tuple(state[key].shape) != shape:
                    raise ValueError(
                        f"{entry.spec.name}: loaded state {key!r} has shape "
                        f"{tuple(state[key].shape)}, expected {shape}; a pickled "
                        "optimizer continues on one process only"
                    )
        self.mark_started()

    def _allocate_plain(self, entry: Entry, state: dict[str, Any]) -> None:
        options = entry.spec.options
        dtype = options.state_dtype or entry.spec.dtype
        for key in plain_moments(self.method, options):
            if key not in state:
                state[key] = entry.piece.zeros_like(dtype)
            elif local(state[key]).shape != entry.param.shape:
                raise ValueError(
                    f"{entry.spec.name}: loaded state {key!r} has shape "
                    f"{tuple(local(state[key]).shape)}, expected "
                    f"{tuple(entry.param.shape)}"
                )

    def save_state(self) -> dict[int, dict[str, Any]]:
        """The logical state of every parameter; a collective.

        Returns:
            By position of the parameter: ``step`` and full logical tensors.
        """
        return SavedState(self).save()

    def load_state(
        self, saved: dict[int, dict[str, Any]], *, partial: bool = False
    ) -> None:
        """Take over a logical state; a collective.

        Args:
            saved: By position of the parameter.
            partial: Others shall stay as they are.
        """
        SavedState(self).load(saved, partial=partial)
        self.mark_loaded()

    def mark_loaded(self) -> None:
        """The states, and weights beside them, are others than before."""
        self.agreement.compared = 0
        self.mark_started()

    def mark_started(self) -> None:
        """See from the step counts whether a real step has been made."""
        self.bases.look_again()
        self.agreement.started = any(
            float(entry.state()["step"]) > 0
            for entry in self.entries
            if entry.member and entry.state()
        )

    def step(self, *, new: bool = False) -> bool:
        """One step of every parameter that has a gradient on any rank.

        Args:
            new: This rank has parameters that are not planned yet.

        Returns:
            False if any rank has such ones, and nothing was done.

        Raises:
            RuntimeError: On every rank, if a gradient anywhere is non-finite or
                sparse (nothing has changed then), or if an owner fails.
            ValueError: On every rank, if options are invalid or differ.
        """
        now = self.group_options.read()
        options = now.options
        grads = [entry.grad() for entry in self.entries]
        present = self.agreement.reach(grads, now, new=new)
        if present is None:
            return not self.agreement.unplanned
        matrices = {matrix.index for matrix in self.matrices}
        for i in matrices:
            if present[i]:
                self.entries[i].state()["step"] += 1
        for bucket in self.buckets:
            jobs = [m for m in bucket.matrices if present[m.index]]
            if not jobs:
                continue
            pieces = [self._piece(m, grads[m.index], options) for m in bucket.matrices]
            run = self._update_owned if bucket.kind == "owner" else self._blocks.update
            updates = run(bucket, jobs, pieces, options)
            for matrix, piece in zip(bucket.matrices, updates):
                if present[matrix.index]:
                    self._apply(self.entries[matrix.index], piece, options)
        others = [i for i, has in enumerate(present) if has and i not in matrices]
        plain_update(self.method, [self.entries[i] for i in others], options)
        return True

    def report(self) -> Report:
        """What every rank computes, keeps and sends."""
        return make_report(self)

    def plain_bytes(self) -> int:
        """Bytes that this rank keeps besides the moments and rotations of matrices."""
        whole = {matrix.index for matrix in self.matrices}
        return sum(
            local(value).nbytes
            for i, entry in enumerate(self.entries)
            if entry.member
            for key, value in entry.state().items()
            if key == "step" or i not in whole
        )

    def refresh_plans(self, bucket: Bucket) -> tuple[ExchangePlan, ...]:
        """The exchanges of a refresh of every matrix of a bucket."""
        rotated = [m for m in bucket.matrices if m.rotated]
        if bucket.kind == "owner" or not rotated:
            return ()
        basis = [self.entries[m.index].group["basis"] for m in rotated]
        by_gram = [m.by_gram(method) for m, method in zip(rotated, basis)]
        return refresh_plans(rotated, by_gram, self.comm.size)

    def sum_bytes(self, bucket: Bucket) -> list[int]:
        """Bytes of each all-reduce of sums over blocks, in an ordinary step."""
        return [] if bucket.kind == "owner" else self._blocks.sum_bytes(bucket)

    def options_of(self, matrix: MatrixPlan, options: dict[int, Options]) -> Options:
        """The options of a matrix's group in this step."""
        return options[id(self.entries[matrix.index].group)]

    def state_of(self, matrix: MatrixPlan) -> dict[str, Tensor]:
        """This rank's moments and rotations of a matrix."""
        state = self.entries[matrix.index].state()
        return {key: value for key, value in state.items() if key != "step"}

    def time_of(self, matrix: MatrixPlan) -> int:
        """t, counted from 1."""
        return int(self.entries[matrix.index].state()["step"])

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        here = (entry.param.device for entry in self.entries if entry.member)
        return next(here, torch.device("cpu"))

    def _piece(
        self, matrix: MatrixPlan, grad: Tensor | None, options: dict[int, Options]
    ) -> Tensor:
        """The local gradient in the shape of its region; zeros if there is none."""
        entry = self.entries[matrix.index]
        if grad is None:
            dtype, device = entry.spec.grad_dtype, entry.param.device
            return torch.zeros(entry.region.shape, dtype=dtype, device=device)
        piece = grad.reshape(entry.region.shape).to(entry.spec.grad_dtype)
        # Greater entries count as this: their squares overflow as it is, and what is
        # summed over them on the way (norms, products with a rotation) does not.
        limit = torch.finfo(matrix.work_dtype).max / (2 * matrix.view.numel)
        largest = self.agreement.largest.get(matrix.index, math.inf)
        if min(largest, torch.finfo(piece.dtype).max) > limit:
            piece = piece.clamp(-limit, limit)
        # The order in memory decides how a product rounds, and is lost on the way.
        piece = piece.contiguous()
        return -piece if self.options_of(matrix, options).maximize else piece

    def _update_owned(
        self,
        bucket: Bucket,
        jobs: Sequence[MatrixPlan],
        pieces: Sequence[Tensor],
        options: dict[int, Options],
    ) -> list[Tensor]:
        """Gradients to their owners, the plain algorithm there, updates back."""
        gather, scatter = bucket.hops[0]
        work = [m.work_dtype for m in bucket.matrices]
        wire = [self.entries[m.index].spec.grad_dtype for m in bucket.matrices]
        device = self.device
        full, _ = self.exchange.run(
            gather, pieces, wire, work, device=device, into="gathered"
        )

        failure: Exception | None = None
        status = 0
        updates = list(full)
        try:
            self._compute(bucket, jobs, updates, options)
        except Exception as error:
            if self.comm.size == 1:
                raise
            # The other ranks wait for this one's chunk: fail after it is sent.
            failure, status = error, 1 + self._computing

        back, statuses = self.exchange.run(
            scatter, updates, work, work, device=device, status=status, into="updates"
        )
        self.raise_together(statuses, failure)
        return back

    def raise_together(
        self, statuses: dict[int, int], failure: Exception | None
    ) -> None:
        """Raise on every rank if an owner failed.

        Args:
            statuses: Status words by rank: 1 + the index of a matrix.
            failure: What this rank itself met.

        Raises:
            RuntimeError: It names the parameter and the owner.
        """
        for rank, word in statuses.items():
            if word:
                name = self.entries[word - 1].spec.name
                raise RuntimeError(
                    f"{name}: its owner, rank {rank}, could not compute the update"
                    + (f": {failure}" if failure is not None else "")
                    + "; states may have advanced: restart from a checkpoint"
                ) from failure

    def _compute(
        self,
        bucket: Bucket,
        jobs: Sequence[MatrixPlan],
        full: list[Tensor],
        options: dict[int, Options],
    ) -> None:
        """Replace this rank's full gradients by updates, a batch at a time."""
        place = {m.index: i for i, m in enumerate(bucket.matrices)}
        mine = [m for m in jobs if m.route.owner == self.comm.rank]
        for batch in self.batches.of(mine):

            def note(i: int, basis: Basis, batch: Any = batch) -> None:
                self.bases.note(batch[i], basis)

            self._computing = batch[0].index
            updates = update(
                [full[place[m.index]] for m in batch],
                [self.state_of(m) for m in batch],
                method=self.method,
                options=self.options_of(batch[0], options),
                steps=[self.time_of(m) for m in batch],
                refresh=[self.bases.due(m, options) for m in batch],
                note=note,
            )
            for matrix, result in zip(batch, updates):
                full[place[matrix.index]] = result

    def _apply(self, entry: Entry, piece: Tensor, options: dict[int, Options]) -> None:
        """Step 7 on this rank's shard: decay, then subtract the update."""
        group = options[id(entry.group)]
        lr = float(group.lr)
        param = entry.param
        if group.weight_decay:
            param.mul_(1.0 - lr * group.weight_decay)
        param.add_(piece.view(param.shape), alpha=-lr)


def _warn_of_lopsided(matrices: Sequence[MatrixPlan]) -> None:
    lopsided = [
        m
        for m in matrices
        if m.rotated
        and max(m.view.rows, m.view.cols) > LOPSIDED * min(m.view.rows, m.view.cols)
    ]
    if lopsided:
        first = lopsided[0].view
        logger.warning(
            "%s: rotated as a %d x %d matrix, and %d more, over %d times as long as "
            "wide; if it is a stack of matrices or a table, put it in a group with "
            '"rotate": False',
            first.name,
            first.rows,
            first.cols,
            len(lopsided) - 1,
            LOPSIDED,
        )
