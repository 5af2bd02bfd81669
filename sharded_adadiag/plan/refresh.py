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
    matrices: tuple[MatrixPlan, ...], by_gram: tuple[bool, ...], world_size: int
) -> tuple[ExchangePlan, ExchangePlan]:
    """What a refresh moves: to the heads, and the rotations to the teams.

    Args:
        matrices: Those whose bases are due.
        by_gram: Whether each is computed from Gram blocks.
        world_size: Number of ranks.

    Returns:
        The two exchanges.
    """
    collect, distribute = [], []
    for m, gram in zip(matrices, by_gram):
        rows, cols, owner = m.view.rows, m.view.cols, m.route.owner
        sizes = [k for k, wanted in ((rows, m.left), (cols, m.right)) if wanted]
        if gram:
            (k,) = sizes
            summands = everywhere(k, k, world_size)
            target = only_on(owner, k, k, world_size)
            collect.append(Move(k, summands, target, 8, summed=True))
        else:
            target = only_on(owner, rows, cols, world_size)
            collect.append(Move(cols, m.view.layout, target, m.view.grad_itemsize))
        for k in sizes:
            source = only_on(owner, k, k, world_size)
            target = on_team(m.route.team, k, k, world_size)
            distribute.append(Move(k, source, target, m.rotation_dtype.itemsize))
    return (
        ExchangePlan(world_size, tuple(collect)),
        ExchangePlan(world_size, tuple(distribute)),
    )
