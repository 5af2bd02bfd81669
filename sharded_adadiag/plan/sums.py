"""Bytes of the sums over blocks that a rule asks the ranks for."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import torch

from sharded_adadiag.algorithm.rehearsal import Asked, rehearse
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.plan import Plan
from sharded_adadiag.plan.rounds import Round


def sums_of(plan: Plan) -> list[list[int]]:
    """Bytes of each all-reduce of sums over blocks, in an ordinary step.

    Args:
        plan: The plan.

    Returns:
        For each round one number for each all-reduce, equal on all ranks.
    """
    known: dict[object, list[list[Asked]]] = {}
    waits: dict[tuple[int, int], list[list[Asked]]] = {}
    for m in plan.members:
        options = plan.specs[m.index].options
        # Adam's rule waits for nothing.
        waiting = plan.rule.factored or options.noise_floor > 0.0
        if waiting and m.route.kind != "owner":
            block = m.route.moments.layout[m.route.owner].shape
            key = block, m.view.rows, m.view.cols, m.work_dtype, id(options)
            if key not in known:
                known[key] = _across_ranks(m, plan)
            waits[m.key] = known[key]
    return [_of_round(some, waits) for some in plan.rounds]


def _of_round(
    some: Round, waiting: Mapping[tuple[int, int], list[list[Asked]]]
) -> list[int]:
    """The rules of all matrices wait together, for one all-reduce of each dtype."""
    waits = [waiting.get(part.matrix.key, []) for part in some.parts]
    found: list[int] = []
    for together in itertools.zip_longest(*waits, fillvalue=()):
        sizes: Counter[torch.dtype] = Counter()
        for asked in itertools.chain.from_iterable(together):
            sizes[asked.dtype] += asked.nbytes
        found.extend(sizes.values())
    return found


def _across_ranks(matrix: MatrixPlan, plan: Plan) -> list[list[Asked]]:
    """The sums of one matrix to which several ranks contribute, at each wait."""
    rank, moments = matrix.route.owner, matrix.route.moments
    waits = rehearse(
        plan.rule,
        (moments.layout[rank].shape, matrix.work_dtype),
        matrix.state_shapes(rank),
        plan.specs[matrix.index].options,
        matrix.shape,
    )
    return [[a for a in asked if a.over in {"all", moments.split}] for asked in waits]
