"""Rounds: what is exchanged and worked on together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import Layout
from sharded_adadiag.plan.matrices import MatrixPlan

# Without communication there is nothing to fuse, only temporary memory to save.
LOCAL_ROUND_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What one round works on of one matrix.

    Attributes:
        matrix: The matrix.
        layouts: Where the part's entries are at each stage of the matrix's route. The
            first is always the whole storage layout.
        whole: Whether the part is all of the matrix.
    """

    matrix: MatrixPlan
    layouts: tuple[Layout, ...]
    whole: bool = True

    @classmethod
    def all_of(cls, matrix: MatrixPlan) -> Part:
        """The part that is all of a matrix."""
        return cls(matrix, tuple(stage.layout for stage in matrix.route.stages))


@dataclasses.dataclass(frozen=True)
class Round:
    """Parts that pass their stages together.

    Attributes:
        parts: The parts.
        world_size: Number of ranks.
        moves: For the hop from stage k to k + 1, the plan there and the plan back.
        members: Positions of the parts that make hop k.
    """

    parts: tuple[Part, ...]
    world_size: int
    moves: tuple[tuple[ExchangePlan, ExchangePlan], ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parts: Sequence[Part], world_size: int) -> Round:
        """The round of these parts, with the plans of its exchanges."""
        moves, members = [], []
        for k in range(max(len(part.layouts) for part in parts) - 1):
            who = [i for i, part in enumerate(parts) if len(part.layouts) > k + 1]
            there = tuple(_move(parts[i], k) for i in who)
            plan = ExchangePlan(world_size, there)
            back = plan.inverse([parts[i].matrix.view.work_itemsize for i in who])
            moves.append((plan, back))
            members.append(tuple(who))
        return cls(tuple(parts), world_size, tuple(moves), tuple(members))

    @property
    def num_collectives(self) -> int:
        """All-to-alls of an ordinary step."""
        return sum(not plan.is_local for pair in self.moves for plan in pair)

    def bytes_sent(self, rank: int) -> int:
        """Bytes a rank sends to others in an ordinary step."""
        return sum(plan.bytes_sent(rank) for pair in self.moves for plan in pair)


def make_rounds(
    matrices: Sequence[MatrixPlan], world_size: int, buffer_bytes: int
) -> list[Round]:
    """Group matrices so that an exchange is large but its memory is bounded.

    Within a round the matrices come from all heads in turn, so that all ranks work
    at the same time.

    Args:
        matrices: All matrices.
        world_size: Number of ranks.
        buffer_bytes: What a rank may use for exchanges.

    Returns:
        The rounds, equal on every rank.
    """
    rounds = []
    limit = buffer_bytes * world_size if world_size > 1 else LOCAL_ROUND_BYTES
    for kind in ("owner", "team", "broadcast"):
        alike = [m for m in matrices if m.route.kind == kind]
        batch: list[Part] = []
        size = 0
        for matrix in _in_turn(alike):
            bytes_ = matrix.view.numel * matrix.view.work_itemsize
            if batch and size + bytes_ > limit:
                rounds.append(Round.of(batch, world_size))
                batch, size = [], 0
            batch.append(Part.all_of(matrix))
            size += bytes_
        if batch:
            rounds.append(Round.of(batch, world_size))
    return rounds


def _in_turn(matrices: Sequence[MatrixPlan]) -> list[MatrixPlan]:
    """The first of each head, then the second of each, and so on."""
    count: dict[int, int] = {}
    order = []
    for matrix in matrices:
        head = matrix.route.owner
        order.append((count.get(head, 0), head, matrix.index))
        count[head] = count.get(head, 0) + 1
    ranked = sorted(zip(order, matrices), key=lambda pair: pair[0])
    return [matrix for _, matrix in ranked]


def _move(part: Part, k: int) -> Move:
    """Hop k; a gradient that no stage has rotated travels in its own dtype."""
    view = part.matrix.view
    raw = part.matrix.route.raw(k)
    itemsize = view.grad_itemsize if raw else view.work_itemsize
    return Move(view.cols, part.layouts[k], part.layouts[k + 1], itemsize)
