"""What every rank computes, keeps and sends, as a table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharded_adadiag.plan.matrices import MatrixPlan
    from sharded_adadiag.step.engine import Engine


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixRow:
    """One matrix.

    Attributes:
        name: Of the parameter.
        rows: Of its matrix view.
        cols: Of its matrix view.
        sides: ``"left"``, ``"right"``, ``"left+right"`` or ``"-"``.
        route: ``"owner"`` or ``"broadcast"``.
        owner: The rank that computes its bases.
        state_bytes: In the whole group.
    """

    name: str
    rows: int
    cols: int
    sides: str
    route: str
    owner: int
    state_bytes: int


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
    """

    method: str
    matrices: tuple[MatrixRow, ...]
    ranks: tuple[RankRow, ...]
    collectives_per_step: int
    refresh_collectives: int
    plain: int

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
        return (
            f"{self.method}: {len(self.matrices)} matrices, {self.plain} parameters "
            f"updated in place, {self.collectives_per_step} collectives per step "
            f"(+{self.refresh_collectives} when all bases are refreshed)\n\n"
            f"{per_matrix}\n\n{per_rank}"
        )


def make_report(engine: Engine) -> Report:
    """The report of an engine's plan.

    Args:
        engine: With its states allocated.

    Returns:
        The report, equal on every rank.
    """
    world_size = engine.comm.size
    matrices = engine.members()
    rows = []
    for m in matrices:
        sides = [s for s, wanted in (("left", m.left), ("right", m.right)) if wanted]
        rows.append(
            MatrixRow(
                m.view.name,
                m.view.rows,
                m.view.cols,
                "+".join(sides) or "-",
                m.route.kind,
                m.route.owner,
                sum(m.state_bytes(rank) for rank in range(world_size)),
            )
        )
    agreement = engine.agreement.nbytes()
    sums = engine.sum_bytes()
    refreshes = engine.refresh_plans()
    plain = engine.comm.all_gather_object(engine.plain_bytes())
    ranks = []
    for rank in range(world_size):
        owned = [m for m in matrices if m.route.owner == rank]
        ranks.append(
            RankRow(
                rank,
                len(owned),
                plain[rank] + sum(m.state_bytes(rank) for m in matrices),
                agreement
                + sum(round_.bytes_sent(rank) for round_ in engine.rounds)
                + sum(sum(rounds) for rounds in sums),
                sum(plan.bytes_sent(rank) for plan in refreshes),
                sum(m.cost.refresh for m in owned),
                sum(_step_share(m, rank) for m in matrices),
            )
        )
    return Report(
        engine.method.name,
        tuple(rows),
        tuple(ranks),
        int(agreement > 0)
        + sum(round_.num_collectives for round_ in engine.rounds)
        + sum(len(rounds) for rounds in sums),
        sum(not plan.is_local for plan in refreshes),
        sum(entry.member for entry in engine.entries) - len(matrices),
    )


def _step_share(matrix: MatrixPlan, rank: int) -> int:
    """A rank's part of a matrix's work in a step."""
    here = matrix.route.moments.layout[rank].numel
    return matrix.cost.step * here // max(matrix.view.numel, 1)


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
