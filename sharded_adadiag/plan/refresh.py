"""What a refresh of bases moves between ranks."""

from __future__ import annotations

import functools

from sharded_adadiag.plan.exchange_plan import ExchangePlan, Move
from sharded_adadiag.plan.geometry import everywhere, on_team, only_on
from sharded_adadiag.plan.matrices import MatrixPlan

# Which bases are due together differs from slot to slot, and may from time to time.
PLANS_KEPT = 128


@functools.lru_cache(PLANS_KEPT)
def refresh_plans(
    matrices: tuple[MatrixPlan, ...], made: tuple[tuple[str, ...], ...], world_size: int
) -> tuple[ExchangePlan, ExchangePlan]:
    """What a refresh moves: to the heads, and the rotations to the teams.

    Args:
        matrices: Those whose bases are due.
        made: What each basis is made of (`MatrixPlan.made_of`).
        world_size: Number of ranks.

    Returns:
        The two exchanges.
    """
    collect: list[Move] = []
    distribute: list[Move] = []
    for m, parts in zip(matrices, made):
        rows, cols, owner = m.view.rows, m.view.cols, m.route.owner
        sizes = [k for k, wanted in ((rows, m.left), (cols, m.right)) if wanted]
        collect.extend(_collected(m, part, world_size) for part in parts)
        for k in sizes:
            source = only_on(owner, k, k, world_size)
            target = on_team(m.route.team, k, k, world_size)
            distribute.append(Move(k, source, target, m.rotation_dtype.itemsize))
    return (
        ExchangePlan(world_size, tuple(collect)),
        ExchangePlan(world_size, tuple(distribute)),
    )


def _collected(m: MatrixPlan, part: str, world_size: int) -> Move:
    """The way to the head of something that a basis is made of."""
    rows, cols, owner = m.view.rows, m.view.cols, m.route.owner
    if part == "gradient":
        target = only_on(owner, rows, cols, world_size)
        return Move(cols, m.view.layout, target, m.view.grad_itemsize)
    if part == "gram":
        k = rows if m.left else cols
        target = only_on(owner, k, k, world_size)
        return Move(k, everywhere(k, k, world_size), target, 8, summed=True)
    spec = m.states[part]
    height, width = spec.shape((rows, cols), (rows, cols))
    target = only_on(owner, height, width, world_size)
    itemsize = spec.dtype(m.moment_dtype, m.rotation_dtype).itemsize
    if spec.kept == "block":
        return Move(width, m.route.moments.layout, target, itemsize)
    source = on_team(m.route.team, height, width, world_size)
    return Move(width, source, target, itemsize, summed=len(m.route.team) > 1)
