"""Matrices that are exchanged together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.route import Kind

# Full-matrix bytes of a bucket per rank: bounds the memory of an exchange.
BUCKET_BYTES = 1 << 26
# Without communication there is nothing to fuse, only temporary memory to save.
LOCAL_BUCKET_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Matrices of one kind of route and the exchanges of their hops.

    Attributes:
        kind: ``"owner"`` or ``"broadcast"``.
        matrices: The matrices.
        hops: For the hop from stage k to k + 1, the plan there and the plan back.
        members: Positions of the matrices that make hop k.
    """

    kind: Kind
    matrices: tuple[MatrixPlan, ...]
    hops: tuple[tuple[ExchangePlan, ExchangePlan], ...]
    members: tuple[tuple[int, ...], ...]

    @property
    def num_collectives(self) -> int:
        """All-to-alls of an ordinary step."""
        return sum(not plan.is_local for pair in self.hops for plan in pair)

    def bytes_sent(self, rank: int) -> int:
        """Bytes a rank sends to others in an ordinary step."""
        return sum(plan.bytes_sent(rank) for pair in self.hops for plan in pair)


def make_buckets(matrices: Sequence[MatrixPlan], world_size: int) -> list[Bucket]:
    """Group matrices so that an exchange is large but its memory is bounded.

    Within a bucket the matrices come from all owners in turn, so that all ranks work
    at the same time.

    Args:
        matrices: All matrices.
        world_size: Number of ranks.

    Returns:
        The buckets, equal on every rank.
    """
    buckets = []
    for kind in ("owner", "broadcast"):
        alike = [m for m in matrices if m.route.kind == kind]
        limit = BUCKET_BYTES * world_size if world_size > 1 else LOCAL_BUCKET_BYTES
        batch: list[MatrixPlan] = []
        size = 0
        for matrix in _in_turn(alike):
            bytes_ = matrix.view.numel * matrix.view.work_itemsize
            if batch and size + bytes_ > limit:
                buckets.append(_bucket(batch, world_size))
                batch, size = [], 0
            batch.append(matrix)
            size += bytes_
        if batch:
            buckets.append(_bucket(batch, world_size))
    return buckets


def _in_turn(matrices: Sequence[MatrixPlan]) -> list[MatrixPlan]:
    """The first of each owner, then the second of each, and so on."""
    count: dict[int, int] = {}
    order = []
    for matrix in matrices:
        owner = matrix.route.owner
        order.append((count.get(owner, 0), owner, matrix.index))
        count[owner] = count.get(owner, 0) + 1
    ranked = sorted(zip(order, matrices), key=lambda pair: pair[0])
    return [matrix for _, matrix in ranked]


def _bucket(matrices: Sequence[MatrixPlan], world_size: int) -> Bucket:
    hops, members = [], []
    for k in range(max(len(m.route.stages) for m in matrices) - 1):
        who = [i for i, m in enumerate(matrices) if len(m.route.stages) > k + 1]
        some = [matrices[i] for i in who]
        there = ExchangePlan(
            world_size,
            tuple(
                Move(
                    m.view.cols,
                    m.route.stages[k].layout,
                    m.route.stages[k + 1].layout,
                    m.view.grad_itemsize if m.route.raw(k) else m.view.work_itemsize,
                )
                for m in some
            ),
        )
        hops.append((there, there.inverse([m.view.work_itemsize for m in some])))
        members.append(tuple(who))
    return Bucket(matrices[0].route.kind, tuple(matrices), tuple(hops), tuple(members))
