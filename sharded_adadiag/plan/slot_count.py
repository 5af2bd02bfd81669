"""How many slots a period has: "auto".

The rule, in one place. A step with a refresh waits for the rank that has most bases to
compute. The number of slots is the one at which all ranks wait least over a period,
of those with which the longest step is under `LONGEST` of an ordinary one; where none
keeps that (few steps, or so many ranks that one basis takes longer than a step), of
those with the shortest longest step. So many ranks have few slots: each waits once.
Numbers tried are powers of two, up to as many as there are steps or matrices.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sharded_adadiag.algorithm.state import Rule, rotated_sides
from sharded_adadiag.plan.cost import step_cost
from sharded_adadiag.plan.schedule import give_slots, slot_weight
from sharded_adadiag.plan.spec import ParamSpec
from sharded_adadiag.plan.view import needs_matrix

# Of an ordinary step.
LONGEST = 1.5


class _Matrix(NamedTuple):
    """Multiply-adds of a step, and of a basis by `slot_weight`."""

    step: int
    refresh: int


def with_slot_counts(
    specs: Sequence[ParamSpec], rule: Rule, world_size: int, other_work: int = 0
) -> list[ParamSpec]:
    """Take a number of slots for the groups that leave it to the plan.

    Args:
        specs: New parameters.
        rule: The optimizer.
        world_size: Number of ranks.
        other_work: Multiply-adds of a step for what is planned already.

    Returns:
        The same with a number in the place of each ``"auto"``.
    """
    asking = [spec for spec in specs if spec.options.refresh_slots == "auto"]
    if not asking:
        return list(specs)
    periods = [spec.options.refresh_every for spec in asking]
    every = min((period for period in periods if period is not None), default=1)
    matrices = [m for spec in asking for m in _matrices(spec, rule) if m.refresh]
    others = (m for spec in specs for m in _matrices(spec, rule))
    work = other_work + sum(m.step for m in others)
    count = slot_count(matrices, work / world_size, every, world_size)
    chosen = {}
    for spec in asking:
        if spec.options not in chosen:
            options = dataclasses.replace(spec.options, refresh_slots=count)
            chosen[spec.options] = options
    return [
        dataclasses.replace(spec, options=chosen.get(spec.options, spec.options))
        for spec in specs
    ]


def slot_count(
    matrices: Sequence[_Matrix], step: float, every: int, world_size: int
) -> int:
    """Apply the rule of this module.

    Args:
        matrices: Those that will have slots.
        step: Multiply-adds of an ordinary step on a rank.
        every: Steps of a period.
        world_size: Number of ranks.

    Returns:
        A number from 1 to ``every``.
    """
    best = (float("inf"), 0, 1)
    count = 1
    while count == 1 or count <= min(every, len(matrices)):
        waits = _waits(matrices, count, world_size)
        longest = max(waits, default=0)
        short_enough = step + longest <= LONGEST * step
        best = min(best, (0 if short_enough else longest, sum(waits), count))
        count *= 2
    return best[-1]


def _waits(matrices: Sequence[_Matrix], count: int, world_size: int) -> list[int]:
    """Multiply-adds of the rank that has most, by slot."""
    slots = give_slots([(count, m.refresh) for m in matrices], {})
    ranks = [[0] * min(world_size, len(matrices)) for _ in range(count)]
    for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].refresh):
        loads = ranks[slots[i]]
        heapq.heapreplace(loads, loads[0] + matrices[i].refresh)
    return [max(loads, default=0) for loads in ranks]


def _matrices(spec: ParamSpec, rule: Rule) -> Iterator[_Matrix]:
    if not needs_matrix(rule, spec.shape, spec.options):
        return
    cols = spec.view.cols
    for rows in spec.view.heights:
        left, right = rotated_sides((rows, cols), spec.options)
        sides = {"left": left, "right": right}
        yield _Matrix(
            step_cost(rows, cols, **sides),
            slot_weight(rows, cols, **sides),
        )
