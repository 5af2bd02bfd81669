"""Which matrices are computed by a team and which by all ranks: "auto".

The rule, in one place. Every matrix starts with one owner, which keeps each rotation
once in the whole group and sends two matrices' worth of elements per step. That
traffic may be `TRAFFIC_BUDGET` of what sharded data parallelism itself moves in a
step (two all-gathers and a reduce-scatter: three times the elements). While it is
over, the matrix that saves most bytes of traffic per byte of memory goes to the
broadcast route, as long as the rotations that are then on every rank stay within
`MEMORY_BUDGET` of a rank's mean share of the state. Who owns what is decided after
that (see `teams`): then what all ranks do is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sharded_adadiag.plan.exchange_plan import Move
from sharded_adadiag.plan.layout import MatrixLayout
from sharded_adadiag.plan.route import Kind, Route

TRAFFIC_BUDGET = 0.10
MEMORY_BUDGET = 0.25
# Passes over the elements that sharded data parallelism makes in a step.
FRAMEWORK_PASSES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """The two ways to compute one matrix.

    Attributes:
        view: The matrix's size and layout.
        broadcast: The route on which all ranks work, or None if it is not possible.
        rotation_bytes: Bytes of its rotations.
        state_bytes: Bytes of all its state.
        refresh_every: Steps between refreshes; None for one refresh ever.
    """

    view: MatrixLayout
    broadcast: Route | None
    rotation_bytes: int
    state_bytes: int
    refresh_every: int | None


def choose(candidates: Sequence[Candidate], world_size: int) -> list[Kind]:
    """Apply the rule of this module, whoever the owners will be.

    Args:
        candidates: One per matrix.
        world_size: Number of ranks.

    Returns:
        ``"owner"`` or ``"broadcast"`` for each.
    """
    kinds: list[Kind] = ["owner"] * len(candidates)
    if world_size == 1:
        return kinds
    costs = [owner_bytes(c.view) for c in candidates]
    others = (world_size - 1) / world_size
    allowance = TRAFFIC_BUDGET * FRAMEWORK_PASSES * others
    budget = (
        allowance
        * world_size
        * sum(c.view.numel * c.view.grad_itemsize for c in candidates)
    )
    room = MEMORY_BUDGET * sum(c.state_bytes for c in candidates) / world_size
    traffic = sum(costs)
    if traffic <= budget:
        return kinds

    savings = []
    for i, c in enumerate(candidates):
        if c.broadcast is None:
            continue
        refresh = refresh_bytes(c.view, c.broadcast, c.rotation_bytes)
        per_step = refresh / c.refresh_every if c.refresh_every else 0.0
        saved = costs[i] - step_bytes(c.view, c.broadcast) - per_step
        if saved > 0:
            memory = c.rotation_bytes * others
            savings.append((-saved / max(memory, 1.0), i, saved, memory))
    for _, i, saved, memory in sorted(savings):
        if traffic <= budget:
            break
        if memory <= room:
            kinds[i] = "broadcast"
            room -= memory
            traffic -= saved
    return kinds


def owner_bytes(matrix: MatrixLayout) -> float:
    """Bytes that a gradient and its update move in a step: the mean over owners."""
    held = matrix.layout.numel  # every holder of a piece gets its update
    away = held - held / len(matrix.layout)
    return gather_bytes(matrix) + matrix.work_itemsize * away


def gather_bytes(matrix: MatrixLayout) -> float:
    """Bytes that move when one rank gets the whole gradient: the mean over ranks."""
    at_hand = matrix.layout.numel / len(matrix.layout)
    return matrix.grad_itemsize * (matrix.numel - at_hand)


def step_bytes(matrix: MatrixLayout, route: Route) -> int:
    """Bytes of a matrix that all ranks together send in an ordinary step."""
    layouts = [stage.layout for stage in route.stages]
    total = 0
    for i, (near, far) in enumerate(zip(layouts, layouts[1:])):
        out = matrix.grad_itemsize if route.raw(i) else matrix.work_itemsize
        total += Move(matrix.cols, near, far, out).moved_bytes
        total += Move(matrix.cols, far, near, matrix.work_itemsize).moved_bytes
    return total


def refresh_bytes(matrix: MatrixLayout, route: Route, rotation_bytes: int) -> float:
    """Bytes that all ranks together send, on top, in a refresh on all ranks."""
    others = len(matrix.layout) - 1
    total = float(rotation_bytes * others)
    if route.basis_from == "gram":
        side = matrix.cols if route.moments.right else matrix.rows
        return total + 8 * side * side * others
    return total + gather_bytes(matrix)
