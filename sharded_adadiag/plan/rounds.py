"""Rounds: what is exchanged and worked on together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import Layout, alone
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.packing import pack
from sharded_adadiag.plan.regions import Box

# Without communication there is nothing to fuse, only temporary memory to save.
LOCAL_ROUND_BYTES = 1 << 26


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
        parts: The parts, at most one of each matrix.
        world_size: Number of ranks.
        over_budget: Some rank sends or receives more than a round should.
    """

    parts: tuple[Part, ...]
    world_size: int
    over_budget: bool = False

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the parts that make hop k, from stage k to k + 1."""
        depth = max((len(part.layouts) for part in self.parts), default=1)
        return tuple(
            tuple(i for i, part in enumerate(self.parts) if len(part.layouts) > k + 1)
            for k in range(depth - 1)
        )

    @cached_property
    def moves(self) -> tuple[tuple[ExchangePlan, ExchangePlan], ...]:
        """For the hop from stage k to k + 1, the plan there and the plan back."""
        pairs = []
        for k, who in enumerate(self.members):
            some = [self.parts[i] for i in who]
            plan = ExchangePlan(self.world_size, tuple(_move(p, k) for p in some))
            back = plan.inverse([p.matrix.view.work_itemsize for p in some])
            pairs.append((plan, back))
        return tuple(pairs)

    def on(self, rank: int) -> Round:
        """The round without what lies on other ranks and is worked on there."""
        parts = [
            p for p in self.parts if not p.matrix.held or rank in p.matrix.route.team
        ]
        return dataclasses.replace(self, parts=tuple(parts))

    @property
    def num_collectives(self) -> int:
        """All-to-alls of an ordinary step."""
        return sum(not plan.is_local for pair in self.moves for plan in pair)

    def bytes_sent(self, rank: int) -> int:
        """Bytes a rank sends to others in an ordinary step."""
        return sum(plan.bytes_sent(rank) for pair in self.moves for plan in pair)

    def work(self) -> dict[int, float]:
        """Multiply-adds of a step, by each rank that has any."""
        work: dict[int, float] = {}
        for part in self.parts:
            cost = part.matrix.cost.step / max(part.matrix.view.numel, 1)
            for block, ranks in part.layouts[-1].pieces:
                for rank in ranks:
                    work[rank] = work.get(rank, 0.0) + cost * block.numel
        return work


def make_rounds(
    matrices: Sequence[MatrixPlan], world_size: int, buffer_bytes: int
) -> list[Round]:
    """Group matrices so that all ranks work in each round and its memory is bounded.

    Args:
        matrices: All matrices.
        world_size: Number of ranks.
        buffer_bytes: What a rank may use for exchanges.

    Returns:
        The rounds, equal on every rank.
    """
    if world_size == 1:
        return _local_rounds(matrices)
    limit = round_bytes(buffer_bytes)
    held = [m for m in matrices if m.held]
    matrices = [m for m in matrices if not m.held]
    packed, most = pack(matrices, world_size, limit)
    rounds = []
    for k, nbytes in enumerate(most):
        some, packed[k] = packed[k], {}  # to be freed: it is as large as the round
        parts = tuple(_part(matrices[i], some[i], world_size) for i in sorted(some))
        if parts:
            rounds.append(Round(parts, world_size, nbytes > limit))
    for group in _by_head(held, LOCAL_ROUND_BYTES):
        rounds.append(Round(tuple(map(Part.all_of, group)), world_size))
    return rounds


def round_bytes(buffer_bytes: int) -> int:
    """What a rank may send or receive in a round, in the dtype of the work.

    While a round is worked on, the next arrives (sent and received) and the last leaves
    (its results, sent and received).

    Args:
        buffer_bytes: What a rank may use for exchanges.

    Returns:
        A sixth of it, less what status words may take; at least one.
    """
    # A little is for the status words of messages.
    return max((buffer_bytes - buffer_bytes // 256) // 6, 1)


def step_efficiency(rounds: Sequence[Round]) -> float:
    """The mean rank's work of a step over what the busiest ranks of the rounds do.

    Args:
        rounds: All rounds of a step.

    Returns:
        1 if all ranks work all the time.
    """
    works = [one.work() for one in rounds]
    busiest = sum(max(work.values(), default=0.0) for work in works)
    total = sum(sum(work.values()) for work in works)
    return total / rounds[0].world_size / busiest if busiest else 1.0


def refresh_rounds(
    matrices: Sequence[MatrixPlan], buffer_bytes: int
) -> list[tuple[MatrixPlan, ...]]:
    """Groups of matrices that are refreshed together.

    A head gets the whole gradients of a group: as many as fit its share of the budget,
    or one that does not fit. All heads are busy as long as they have any.

    Args:
        matrices: Those whose bases are due.
        buffer_bytes: What a rank may use for exchanges.

    Returns:
        The groups.
    """
    return _by_head(matrices, round_bytes(buffer_bytes))


def _by_head(
    matrices: Sequence[MatrixPlan], limit: int
) -> list[tuple[MatrixPlan, ...]]:
    """Groups with at most so many bytes for each head, or one matrix that is larger."""
    groups: list[list[MatrixPlan]] = []
    last: dict[int, tuple[int, int]] = {}  # by head: its group, and bytes there
    for m in matrices:
        nbytes = m.refresh_bytes
        group, there = last.get(m.route.owner, (0, 0))
        if there and there + nbytes > limit:
            group, there = group + 1, 0
        if group == len(groups):
            groups.append([])
        groups[group].append(m)
        last[m.route.owner] = group, there + nbytes
    return [tuple(group) for group in groups]


def _local_rounds(matrices: Sequence[MatrixPlan]) -> list[Round]:
    """The rounds of a single process, which exchanges nothing and cuts nothing."""
    rounds: list[list[Part]] = []
    size = 0
    for matrix in matrices:
        nbytes = matrix.view.numel * matrix.view.work_itemsize
        if not rounds or size + nbytes > LOCAL_ROUND_BYTES:
            rounds.append([])
            size = 0
        rounds[-1].append(Part.all_of(matrix))
        size += nbytes
    return [Round(tuple(parts), 1) for parts in rounds]


def _part(matrix: MatrixPlan, blocks: dict[int, Box] | None, world_size: int) -> Part:
    if blocks is None:
        return Part.all_of(matrix)
    pieces = tuple((block, alone(rank)) for rank, block in sorted(blocks.items()))
    layouts = matrix.view.layout, Layout(world_size, pieces)
    return Part(matrix, layouts, whole=False)


def _move(part: Part, k: int) -> Move:
    """Hop k; a gradient that no stage has rotated travels in its own dtype."""
    view = part.matrix.view
    raw = part.matrix.route.raw(k)
    itemsize = view.grad_itemsize if raw else view.work_itemsize
    return Move(view.cols, part.layouts[k], part.layouts[k + 1], itemsize)
