"""The broadcast distribution: every rank updates its own blocks of the matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharded_adadiag.algorithm.basis import (
    Basis,
    basis_of_gram,
    compute_basis,
    gram_matrix,
)
from sharded_adadiag.algorithm.rotation import rotate, rotate_back
from sharded_adadiag.algorithm.sums import PartialSum, run, together
from sharded_adadiag.algorithm.update import install, moment_rule, rotations
from sharded_adadiag.comm.exchange import window
from sharded_adadiag.options import Options
from sharded_adadiag.plan.buckets import Bucket
from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.refresh import refresh_plans

if TYPE_CHECKING:
    from sharded_adadiag.step.engine import Engine

Pieces = list[Tensor]
# Which bases are due together may differ from refresh to refresh.
PLANS_KEPT = 16


class BlockUpdates:
    """Updates of matrices whose rotations are on every rank.

    Args:
        engine: Whose matrices they are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._refresh_plans = functools.lru_cache(PLANS_KEPT)(self._make_plans)

    def update(
        self,
        bucket: Bucket,
        jobs: Sequence[MatrixPlan],
        pieces: Sequence[Tensor],
        options: dict[int, Options],
    ) -> Pieces:
        """Refresh what is due, then rotate, update and rotate back piece by piece.

        Args:
            bucket: The matrices.
            jobs: Those that take part in this step.
            pieces: This rank's piece of each gradient of the bucket.
            options: Of each group, by its identity.

        Returns:
            This rank's piece of each update of the bucket.
        """
        due = [
            (m, piece)
            for m, piece in zip(bucket.matrices, pieces)
            if m in jobs and self.engine.bases.due(m, options)
        ]
        if due:
            self._refresh([m for m, _ in due], [p for _, p in due], options)
        work: Pieces = list(pieces)
        depth = len(bucket.hops) + 1
        for k in range(depth):
            self._rotate(bucket, k, work, options, back=False)
            if k + 1 < depth:
                self._hop(bucket, k, work, back=False)
        self._moments(bucket, jobs, work, options)
        for k in reversed(range(depth)):
            self._rotate(bucket, k, work, options, back=True)
            if k > 0:
                self._hop(bucket, k - 1, work, back=True)
        return work

    def _hop(self, bucket: Bucket, k: int, work: Pieces, *, back: bool) -> None:
        who = bucket.members[k]
        some = [bucket.matrices[i] for i in who]
        dtypes = [m.work_dtype for m in some]
        # A gradient that no stage has rotated yet travels in its own dtype.
        wire = [
            work[i].dtype if not back and m.route.raw(k) else m.work_dtype
            for i, m in zip(who, some)
        ]
        moved, _ = self.engine.exchange.run(
            bucket.hops[k][int(back)],
            [work[i] for i in who],
            wire,
            dtypes,
            device=self.engine.device,
            into=f"hop {k} {'back' if back else 'there'}",
        )
        for i, piece in zip(who, moved):
            work[i] = piece

    def _rotate(
        self,
        bucket: Bucket,
        k: int,
        work: Pieces,
        options: dict[int, Options],
        *,
        back: bool,
    ) -> None:
        """Apply the rotations of stage k to this rank's pieces, in place of them."""
        place = {m.index: i for i, m in enumerate(bucket.matrices)}
        here = [
            m for m in bucket.matrices if len(m.route.stages) > k and _rotates(m, k)
        ]
        turn = rotate_back if back else rotate
        for batch in self.engine.batches.of(here):
            stage = batch[0].route.stages[k]
            grads = [work[place[m.index]].to(m.work_dtype) for m in batch]
            states = [self.engine.state_of(m) for m in batch]
            left = rotations(states, "rotation_left", grads[0]) if stage.left else None
            right = (
                rotations(states, "rotation_right", grads[0]) if stage.right else None
            )
            for matrix, result in zip(batch, turn(grads, left, right)):
                work[place[matrix.index]] = result

    def _moments(
        self,
        bucket: Bucket,
        jobs: Sequence[MatrixPlan],
        work: Pieces,
        options: dict[int, Options],
    ) -> None:
        """Steps 4-6 on this rank's pieces; sums over pieces are fused."""
        place = {m.index: i for i, m in enumerate(bucket.matrices)}
        batches = self.engine.batches.of(jobs)
        rules = [
            moment_rule(
                self.engine.method,
                [work[place[m.index]].to(m.work_dtype) for m in batch],
                [self.engine.state_of(m) for m in batch],
                self.engine.options_of(batch[0], options),
                [self.engine.time_of(m) for m in batch],
                (batch[0].view.rows, batch[0].view.cols),
            )
            for batch in batches
        ]
        splits = [batch[0].route.moments.split for batch in batches]
        directions = run(together(rules), lambda asked: self._totals(asked, splits))
        for batch, results in zip(batches, directions):
            for matrix, result in zip(batch, results):
                work[place[matrix.index]] = result

    def _totals(self, asked: list[PartialSum], splits: Sequence[str]) -> list[Tensor]:
        """Add up the ranks' sums; one all-reduce for each dtype that needs any."""
        totals = [partial.value for partial in asked]
        across: dict[torch.dtype, list[int]] = {}
        for i, partial in enumerate(asked):
            if partial.over in ("all", splits[partial.matrix]):
                across.setdefault(partial.value.dtype, []).append(i)
        for which in across.values():
            flat = torch.cat([totals[i].reshape(-1) for i in which])
            flat = flat.to(self.engine.comm.device(flat.device))
            self.engine.comm.all_reduce_sum_(flat)
            sizes = [totals[i].numel() for i in which]
            for i, total in zip(which, flat.split(sizes)):
                totals[i] = total.view(totals[i].shape).to(totals[i].device)
        return totals

    def sum_bytes(self, bucket: Bucket) -> list[int]:
        """Bytes of each all-reduce of a step, found by a rehearsal on meta tensors."""
        rounds: list[int] = []
        rules, splits = [], []
        for batch in self.engine.batches.of(bucket.matrices):
            m = batch[0]
            options = Options.from_group(self.engine.entries[m.index].group)
            if not self.engine.method.factored and options.noise_floor == 0.0:
                continue  # Adam's rule waits for nothing
            shapes = m.state_shapes(self.engine.comm.rank)
            region = m.route.moments.layout[self.engine.comm.rank]
            rules.append(
                moment_rule(
                    self.engine.method,
                    [torch.empty(region.shape, dtype=m.work_dtype, device="meta")]
                    * len(batch),
                    [
                        {
                            key: torch.empty(shape, dtype=dtype, device="meta")
                            for key, (shape, dtype) in shapes.items()
                        }
                        for _ in batch
                    ],
                    options,
                    [1] * len(batch),
                    (m.view.rows, m.view.cols),
                )
            )
            splits.append(m.route.moments.split)

        def count(asked: list[PartialSum]) -> list[Tensor]:
            sizes: dict[torch.dtype, int] = {}
            for partial in asked:
                if partial.over in ("all", splits[partial.matrix]):
                    dtype = partial.value.dtype
                    sizes[dtype] = sizes.get(dtype, 0) + partial.value.nbytes
            rounds.extend(sizes.values())
            return [partial.value for partial in asked]

        run(together(rules), count)
        return rounds

    def _refresh(
        self,
        matrices: Sequence[MatrixPlan],
        pieces: Sequence[Tensor],
        options: dict[int, Options],
    ) -> None:
        """One rank computes each basis; every rank receives it."""
        engine, rank = self.engine, self.engine.comm.rank
        by_gram = [m.by_gram(engine.options_of(m, options).basis) for m in matrices]
        collect, distribute = self._refresh_plans(
            tuple(m.index for m in matrices), tuple(by_gram)
        )
        sent, wire, work = [], [], []
        for m, piece, gram in zip(matrices, pieces, by_gram):
            if gram:
                # Its own part of the piece: a replica has another.
                own = next(s for s in m.route.stages if s.left or s.right).layout[rank]
                block = window(piece, m.view.layout[rank], own, m.view.cols)
                sent.append(gram_matrix(block, left=m.left))
                wire.append(torch.float64)
                work.append(torch.float64)
            else:
                sent.append(piece)
                wire.append(piece.dtype)
                work.append(m.work_dtype)
        collected, _ = engine.exchange.run(
            collect, sent, wire, work, device=engine.device, into="collected"
        )
        found: list[Basis] = []
        failure: Exception | None = None
        status = 0
        for m, gathered in zip(matrices, collected):
            basis = Basis(None, None)
            if m.route.owner == rank:
                try:
                    basis = self._basis(m, gathered, options)
                except Exception as error:
                    if engine.comm.size == 1:
                        raise
                    # The others wait for a rotation: fail after it is sent.
                    failure, status = error, 1 + m.index
            found.append(basis)
        statuses = self._distribute(matrices, found, distribute, options, status)
        engine.raise_together(statuses, failure)

    def _make_plans(
        self, which: tuple[int, ...], by_gram: tuple[bool, ...]
    ) -> tuple[ExchangePlan, ExchangePlan]:
        planned = {m.index: m for m in self.engine.matrices}
        return refresh_plans(
            [planned[i] for i in which], by_gram, self.engine.comm.size
        )

    def _basis(
        self, matrix: MatrixPlan, gathered: Tensor, options: dict[int, Options]
    ) -> Basis:
        """On the owner: the new basis."""
        if not matrix.by_gram(self.engine.options_of(matrix, options).basis):
            precise = torch.promote_types(matrix.work_dtype, matrix.rotation_dtype)
            return compute_basis(
                gathered.to(precise),
                left=matrix.left,
                right=matrix.right,
                method=self.engine.options_of(matrix, options).basis,
            )
        if not bool(gathered.any()):  # zeros tell nothing of a basis
            return Basis(None, None)
        vectors = basis_of_gram(gathered, matrix.work_dtype)
        return Basis(
            vectors if matrix.left else None,
            vectors if matrix.right else None,
            "" if vectors is not None else "kept",
        )

    def _distribute(
        self,
        matrices: Sequence[MatrixPlan],
        found: Sequence[Basis],
        plan: ExchangePlan,
        options: dict[int, Options],
        status: int,
    ) -> dict[int, int]:
        """Send each new rotation to all ranks and install it; their status words.

        Zeros are sent where the old rotation is kept.

        Args:
            matrices: Those whose bases were due.
            found: On their owners, the bases.
            plan: The exchange.
            options: Of each group, by its identity.
            status: This rank's status word.

        Returns:
            The status words that are not 0, by rank.
        """
        device, rank = self.engine.device, self.engine.comm.rank
        sent, dtypes = [], []
        for m, basis in zip(matrices, found):
            for side, wanted, k in (
                (basis.left, m.left, m.view.rows),
                (basis.right, m.right, m.view.cols),
            ):
                if wanted:
                    size = k if m.route.owner == rank else 0
                    if side is None:
                        side = torch.zeros((size, size), device=device)
                    sent.append(side.to(m.rotation_dtype))
                    dtypes.append(m.rotation_dtype)
        arrived, statuses = self.engine.exchange.run(
            plan,
            sent,
            dtypes,
            dtypes,
            device=device,
            status=status,
            into="rotations",
        )
        arrivals = iter(arrived)
        for m, basis in zip(matrices, found):
            precise = torch.promote_types(m.work_dtype, m.rotation_dtype)
            sides = [next(arrivals) if wanted else None for wanted in (m.left, m.right)]
            left, right = (
                side.to(precise) if side is not None and bool(side.any()) else None
                for side in sides
            )
            new = Basis(left, right, basis.fallback)
            self.engine.bases.note(m, new)
            install(self.engine.state_of(m), new, self.engine.options_of(m, options))
        return statuses


def _rotates(matrix: MatrixPlan, k: int) -> bool:
    stage = matrix.route.stages[k]
    return stage.left or stage.right
