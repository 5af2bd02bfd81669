"""Bytes of the sums over blocks that a rule asks the ranks for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.algorithm.sums import PartialSum, run, together
from sharded_adadiag.algorithm.update import moment_rule
from sharded_adadiag.options import Options
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
    """Found by a rehearsal of the rule of every matrix on meta tensors."""
    waiting = []
    for part in some.parts:
        options = plan.specs[part.matrix.index].options
        # Adam's rule waits for nothing.
        waits = plan.rule.factored or options.noise_floor > 0.0
        if waits and part.matrix.route.kind != "owner":
            waiting.append((part.matrix, options))
    rules = [_rehearsal(plan.rule, *one) for one in waiting]
    splits = [matrix.route.moments.split for matrix, _ in waiting]
    found: list[int] = []

    def count(asked: list[PartialSum]) -> list[torch.Tensor]:
        sizes: Counter[torch.dtype] = Counter()
        for partial in asked:
            if partial.over in {"all", splits[partial.matrix]}:
                sizes[partial.value.dtype] += partial.value.nbytes
        found.extend(sizes.values())
        return [partial.value for partial in asked]

    run(together(rules), count)
    return found


def _rehearsal(rule: Rule, matrix: MatrixPlan, options: Options) -> Any:
    """The running rule of one matrix on meta tensors of the head's block."""
    rank = matrix.route.owner

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    block = tensor(matrix.route.moments.layout[rank].shape, matrix.work_dtype)
    states = {key: tensor(*how) for key, how in matrix.state_shapes(rank).items()}
    return moment_rule(rule, [block], [states], options, [1], matrix.shape)
