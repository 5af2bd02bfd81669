"""The states of a parameter's matrices in their saved form.

A stack's states are saved with the dimensions that count the matrices in front, so
moments have the parameter's shape. Of a parameter that is several blocks of rows, what
has a row for each of its rows is saved as one tensor, and all else (rotations, and
moments of columns) by block, with the block's number behind the key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.checkpoint.logical import StateTensor, vector_layout
from sharded_adadiag.plan.geometry import Layout, on_team, only_on
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.plan.regions import Box
from sharded_adadiag.plan.spec import ParamSpec


class _Run(NamedTuple):
    """Consecutive matrices of a stack that one rank keeps one after the other."""

    owner: int
    first: int
    size: int
    place: int  # in the tensor that the owner keeps


def saved_tensors(
    spec: ParamSpec, plans: Sequence[MatrixPlan], world_size: int
) -> Iterator[StateTensor]:
    """Every tensor that is saved of a parameter's matrices.

    Args:
        spec: The parameter.
        plans: The plans of its matrices, in order.
        world_size: Number of ranks.

    Yields:
        The tensors, the same on every rank.
    """
    kind = plans[0].share.kind
    if kind == "stack":
        runs = _runs(plans)
        for key in plans[0].states:
            yield _of_stack(spec, plans[0], key, runs, world_size)
        return
    by_matrix = []
    for key, kept in plans[0].states.items():
        if kept.kept == "block" and (kind == "all" or kept.dims[0] == "m"):
            yield _of_rows(spec, plans, key)
        else:
            by_matrix.append(key)
    for plan in plans:
        for key in by_matrix:
            yield _of_one(plan, key, world_size)


def live_blocks(
    plans: Sequence[MatrixPlan], state: Mapping[str, Tensor], key: str, rank: int
) -> list[Tensor]:
    """Where the blocks of a saved tensor are in the live state; views.

    Args:
        plans: The plans of the parameter's matrices, in order.
        state: This rank's state of the parameter.
        key: The saved tensor's key.
        rank: This rank.

    Returns:
        A tensor for each block of the saved tensor.
    """
    if plans[0].share.kind == "stack":
        places = [
            next(((r.place, r.size) for r in some if r.owner == rank), (0, 0))
            for some in _runs(plans)
        ]
        return [state[key][place : place + count] for place, count in places]
    if key in state:
        return [state[key]]
    return [state[key + plan.share.suffix] for plan in plans]


def _runs(plans: Sequence[MatrixPlan]) -> list[list[_Run]]:
    """The runs of a stack, with no two of one rank in a list."""
    runs: list[_Run] = []
    for plan in plans:
        owner, share = plan.route.owner, plan.share
        if runs and runs[-1].owner == owner:
            # What a rank keeps of a stack lies in the order of the stack.
            runs[-1] = runs[-1]._replace(size=runs[-1].size + share.count)
        else:
            runs.append(_Run(owner, share.first, share.count, share.place))
    lists: list[list[_Run]] = [[]]
    taken: set[int] = set()
    for run in runs:
        if run.owner in taken:
            lists.append([])
            taken.clear()
        lists[-1].append(run)
        taken.add(run.owner)
    return lists


def _of_stack(
    spec: ParamSpec,
    plan: MatrixPlan,
    key: str,
    runs: Sequence[Sequence[_Run]],
    world_size: int,
) -> StateTensor:
    """Each matrix's state is a row of the view."""
    shape = plan.states[key].shape(plan.shape, plan.shape)
    cols, blocks = math.prod(shape), []
    for some in runs:
        top = some[0].first
        pieces = sorted(
            (r.owner, Box(r.first - top, r.first - top + r.size, 0, cols)) for r in some
        )
        placed = tuple((box, range(owner, owner + 1)) for owner, box in pieces)
        layout = Layout(world_size, placed, Box(0, 0, 0, cols))
        blocks.append((sum(r.size for r in some), layout))
    whole = (*spec.view.batch, *shape)
    return StateTensor(spec.name, key, whole, cols, tuple(blocks), _dtype(plan, key))


def _of_rows(spec: ParamSpec, plans: Sequence[MatrixPlan], key: str) -> StateTensor:
    """A moment whose rows are those of the parameter, or its entries."""
    dims = plans[0].states[key].dims
    cols = plans[0].shape[1] if dims == ("m", "n") else 1
    blocks = []
    for plan in plans:
        layout = plan.route.moments.layout
        if dims != ("m", "n"):
            layout = vector_layout(layout, of_rows=dims == ("m",))
        blocks.append((plan.shape["mn".index(dims[0])], layout))
    shape = spec.shape if dims == ("m", "n") else (sum(rows for rows, _ in blocks),)
    return StateTensor(
        spec.name, key, shape, cols, tuple(blocks), _dtype(plans[0], key)
    )


def _of_one(plan: MatrixPlan, key: str, world_size: int) -> StateTensor:
    """A state that is saved by matrix."""
    spec = plan.states[key]
    shape = length, *rest = spec.shape(plan.shape, plan.shape)
    cols = math.prod(rest)
    if spec.kept in {"copy", "sum"}:
        layout = on_team(plan.route.team, length, cols, world_size)
    elif spec.kept == "head":
        layout = only_on(plan.route.owner, length, cols, world_size)
    else:
        layout = vector_layout(plan.route.moments.layout, of_rows=False)
    return StateTensor(
        plan.view.name,
        key + plan.share.suffix,
        shape,
        cols,
        ((length, layout),),
        _dtype(plan, key),
        summed=spec.kept == "sum" and len(plan.route.team) > 1,
    )


def _dtype(plan: MatrixPlan, key: str) -> torch.dtype:
    return plan.states[key].dtype(plan.moment_dtype, plan.rotation_dtype)
