"""What every rank computes, keeps and sends, as a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from sharded_adadiag.plan.exchange_plan import ExchangePlan
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.plan import STEP_BYTES, Plan
from sharded_adadiag.plan.refresh import refresh_plans
from sharded_adadiag.plan.rounds import refresh_rounds


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixRow:
    """One matrix, or consecutive ones of a stack that have one owner.

    Attributes:
        name: The parameter's name, then, if it is several matrices, which of them.
        rows: Number of rows of the matrix, or of each matrix.
        cols: Number of columns of the matrix, or of each matrix.
        sides: ``"left"``, ``"right"``, ``"left+right"`` or ``"-"``.
        route: ``"owner"`` or ``"broadcast"``.
        owner: The rank that computes its bases.
        state_bytes: In the whole group.
        count: How many matrices.
    """

    name: str
    rows: int
    cols: int
    sides: str
    route: str
    owner: int
    state_bytes: int
    count: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class RankRow:
    """One rank.

    Attributes:
        rank: In the optimizer's process group.
        matrices: Number of matrices it owns.
        state_bytes: Bytes of moments, rotations and step counts it keeps.
        bytes_per_step: Bytes it sends to other ranks in an ordinary step, plus the
            bytes it hands to all-reduces.
        refresh_bytes: Bytes it sends on top when every basis is refreshed at once.
        refresh_cost: Multiply-adds of the bases it computes.
        step_cost: Multiply-adds of an ordinary step.
    """

    rank: int
    matrices: int
    state_bytes: int
    bytes_per_step: int
    refresh_bytes: int
    refresh_cost: int
    step_cost: int


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The plan of an optimizer; ``str()`` gives the tables.

    Attributes:
        method: The optimizer's name.
        matrices: One row per matrix that is seen whole.
        ranks: One row per rank.
        collectives_per_step: Collectives of an ordinary step.
        refresh_collectives: Collectives on top when every basis is refreshed.
        plain: Number of parameters updated where they lie.
        over_budget: Rounds that take more than ``buffer_bytes``: a matrix that is
            rotated on two sides, or whose rule asks for sums over it, is not cut.
    """

    method: str
    matrices: tuple[MatrixRow, ...]
    ranks: tuple[RankRow, ...]
    collectives_per_step: int
    refresh_collectives: int
    plain: int
    over_budget: int = 0

    def __str__(self) -> str:
        per_matrix = _table(
            ("parameter", "matrix", "sides", "route", "owner", "state"),
            [
                (
                    m.name,
                    f"{m.rows} x {m.cols}",
                    m.sides,
                    m.route,
                    str(m.owner),
                    _bytes(m.state_bytes),
                )
                for m in self.matrices
            ],
        )
        per_rank = _table(
            (
                "rank",
                "owns",
                "state",
                "sent/step",
                "sent/refresh",
                "refresh cost",
                "step cost",
            ),
            [
                (
                    str(r.rank),
                    str(r.matrices),
                    _bytes(r.state_bytes),
                    _bytes(r.bytes_per_step),
                    _bytes(r.refresh_bytes),
                    f"{r.refresh_cost / 1e9:.3g} G",
                    f"{r.step_cost / 1e9:.3g} G",
                )
                for r in self.ranks
            ],
        )
        over = ""
        if self.over_budget:
            over = (
                f"; {self.over_budget} rounds take more than buffer_bytes, for "
                "matrices that do not travel in blocks"
            )
        return (
            f"{self.method}: {sum(m.count for m in self.matrices)} matrices, "
            f"{self.plain} parameters "
            f"updated in place, {self.collectives_per_step} collectives per step "
            f"(+{self.refresh_collectives} when all bases are refreshed)"
            f"{over}\n\n"
            f"{per_matrix}\n\n{per_rank}"
        )


def report_of(plan: Plan, sums: Sequence[Sequence[int]] = ()) -> Report:
    """The report of a plan, without a word to other ranks.

    Args:
        plan: The plan.
        sums: For each round, the bytes of each all-reduce of sums over blocks in an
            ordinary step, as the rule asks for them. None: there are none.

    Returns:
        The report, equal on every rank.
    """
    matrices = plan.members
    state = state_bytes(plan)
    work = step_work(plan)
    summed = sum(map(sum, sums))
    refreshes = refreshes_of(plan)
    ranks = []
    for rank in range(plan.world_size):
        owned = [m for m in matrices if m.route.owner == rank]
        ranks.append(
            RankRow(
                rank,
                sum(m.share.count for m in owned),
                state[rank],
                plan.agreement_bytes
                + sum(some.bytes_sent(rank) for some in plan.rounds)
                + summed,
                sum(p.bytes_sent(rank) for p in refreshes),
                sum(m.cost.refresh for m in owned),
                work[rank],
            )
        )
    return Report(
        plan.rule.name,
        _matrix_rows(plan),
        tuple(ranks),
        int(plan.agreement_bytes > 0)
        + sum(some.num_collectives for some in plan.rounds)
        + sum(map(len, sums)),
        sum(not p.is_local for p in refreshes),
        len(plan.plain),
        sum(some.over_budget for some in plan.rounds),
    )


def state_bytes(plan: Plan) -> list[int]:
    """Bytes of moments, rotations and step counts that each rank keeps.

    Args:
        plan: The plan.

    Returns:
        By rank.
    """
    everywhere = STEP_BYTES * (len(plan.specs) - len(plan.left_out))
    own = [0] * plan.world_size
    plain = Counter((plan.layouts[i], plan.plain_bytes(i)) for i in plan.plain)
    for (layout, per_entry), count in plain.items():
        for region, ranks in layout.pieces:
            for rank in ranks:
                own[rank] += count * per_entry * region.numel
    for matrix, count in alike(plan.members):
        idle, busy = _kept(matrix)
        everywhere += count * idle
        for rank, kept in busy.items():
            own[rank] += count * (kept - idle)
    return [everywhere + bytes_ for bytes_ in own]


def _kept(matrix: MatrixPlan) -> tuple[int, dict[int, int]]:
    """State bytes of a rank that has no part in a matrix, and of each that has."""
    busy = set(matrix.route.team)
    busy.update(r for _, some in matrix.route.moments.layout.pieces for r in some)
    ranks = range(len(matrix.view.layout))
    idle = next((rank for rank in ranks if rank not in busy), None)
    return (
        0 if idle is None else matrix.state_bytes(idle),
        {rank: matrix.state_bytes(rank) for rank in sorted(busy)},
    )


def step_work(plan: Plan) -> list[int]:
    """Multiply-adds that each rank makes in an ordinary step.

    Args:
        plan: The plan.

    Returns:
        By rank; parameters that are updated where they lie do not count.
    """
    total = [0] * plan.world_size
    for matrix, count in alike(plan.members):
        for region, ranks in matrix.route.moments.layout.pieces:
            share = matrix.cost.step * region.numel // matrix.view.numel
            for rank in ranks:
                total[rank] += count * share
    return total


def alike(matrices: Sequence[MatrixPlan]) -> list[tuple[MatrixPlan, int]]:
    """Matrices of which every rank keeps and works the same, counted together.

    Args:
        matrices: The matrices of one plan.

    Returns:
        One of each kind, and how many there are of it.
    """
    kinds: dict[tuple[object, ...], list[MatrixPlan]] = {}
    for m in matrices:
        dtypes = m.moment_dtype, m.rotation_dtype
        sizes = *m.shape, m.share.count, m.left, m.right, m.cost
        kinds.setdefault((m.route, *dtypes, *sizes, *m.states), []).append(m)
    return [(some[0], len(some)) for some in kinds.values()]


def refreshes_of(plan: Plan) -> list[ExchangePlan]:
    """The exchanges of a refresh of every basis.

    Args:
        plan: The plan.

    Returns:
        None for bases that a rank computes from what it has in a round.
    """
    exchanges: list[ExchangePlan] = []
    for due in refresh_rounds(plan.shared, plan.budget):
        basis = [plan.specs[m.index].options.basis for m in due]
        made = tuple(m.made_of(method) for m, method in zip(due, basis))
        exchanges.extend(refresh_plans(due, made, plan.world_size))
    return exchanges


def _matrix_rows(plan: Plan) -> tuple[MatrixRow, ...]:
    """A row for each matrix; one for those of a stack in a row with one owner."""
    rows: list[MatrixRow] = []
    last: tuple[int, int] | None = None
    for m in plan.members:
        row = _matrix_row(m)
        stack = (m.index, m.route.owner) if m.share.kind == "stack" else None
        if stack is None or stack != last:
            rows.append(row)
            share = m.share
        else:
            count = share.count + m.share.count
            share = dataclasses.replace(share, count=count)
            rows[-1] = dataclasses.replace(
                rows[-1],
                name=share.name(plan.specs[m.index].name),
                state_bytes=rows[-1].state_bytes + row.state_bytes,
                count=count,
            )
        last = stack
    return tuple(rows)


def _matrix_row(matrix: MatrixPlan) -> MatrixRow:
    sides = [side for side in ("left", "right") if getattr(matrix, side)]
    idle, busy = _kept(matrix)
    return MatrixRow(
        matrix.view.name,
        *matrix.shape,
        "+".join(sides) or "-",
        matrix.route.kind,
        matrix.route.owner,
        idle * (len(matrix.view.layout) - len(busy)) + sum(busy.values()),
        matrix.share.count,
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, tuple("-" * w for w in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip()
        for line in lines
    )


def _bytes(number: int) -> str:
    size, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000.0 and len(units) > 1:
        size, units = size / 1000.0, units[1:]
    return f"{size:.4g} {units[0]}"
