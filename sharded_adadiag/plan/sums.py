"""Bytes of the sums over blocks that a rule asks the ranks for."""

from __future__ import annotations

import itertools
from collections import Counter

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
    return [_of_round(some, plan) for some in plan.rounds]


def _of_round(some: Round, plan: Plan) -> list[int]:
    """The rules of all matrices wait together, for one all-reduce of each dtype."""
    waits = [
        _across_ranks(part.matrix, plan)
        for part in some.parts
        if part.matrix.route.kind != "owner"
    ]
    found: list[int] = []
    for together in itertools.zip_longest(*waits, fillvalue=()):
        sizes: Counter[torch.dtype] = Counter()
        for asked in itertools.chain.from_iterable(together):
            sizes[asked.dtype] += asked.nbytes
        found.extend(sizes.values())
    return found


def _across_ranks(matrix: MatrixPlan, plan: Plan) -> list[list[Asked]]:
    """The sums of one matrix to which several ranks contribute, at each wait."""
    options = plan.specs[matrix.index].options
    if not plan.rule.factored and options.noise_floor == 0.0:
        return []  # Adam's rule waits for nothing
    rank, moments = matrix.route.owner, matrix.route.moments
    waits = rehearse(
        plan.rule,
        (moments.layout[rank].shape, matrix.work_dtype),
        matrix.state_shapes(rank),
        options,
        (matrix.view.rows, matrix.view.cols),
    )
    return [[a for a in asked if a.over in {"all", moments.split}] for asked in waits]
