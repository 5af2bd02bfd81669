"""Where the matrices of a plan are in the tensors of their parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.plan.matrices import MatrixPlan

# Moments and rotations of one matrix.
State = dict[str, Tensor]


def states_of(matrix: MatrixPlan, state: Mapping[str, Any]) -> list[State]:
    """What this rank keeps of each matrix.

    Args:
        matrix: One that this rank works on, or the only one of a parameter.
        state: The state of the parameter.

    Returns:
        Moments and rotations of each, without the step count; views.
    """
    share = matrix.share
    tensors = {key: value for key, value in state.items() if key != "step"}
    if share.kind == "all":
        return [tensors]
    if share.kind == "block":
        end = share.suffix
        return [{k.removesuffix(end): v for k, v in tensors.items() if k.endswith(end)}]
    each = (
        value[share.place : share.place + share.count].unbind()
        for value in tensors.values()
    )
    return [dict(zip(tensors, values)) for values in zip(*each)]


def state_shapes(
    matrices: Iterable[MatrixPlan], rank: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors that a rank keeps for one parameter.

    Args:
        matrices: Those of the parameter.
        rank: The rank.

    Returns:
        The same keys for every rank.
    """
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for matrix in matrices:
        for key, (shape, dtype) in matrix.state_shapes(rank).items():
            key += matrix.share.suffix
            if key in shapes:  # more matrices of a stack
                shape = (shapes[key][0][0] + shape[0], *shape[1:])
            shapes[key] = shape, dtype
    return shapes


def specs_of(matrices: Iterable[MatrixPlan]) -> dict[str, StateSpec]:
    """What the tensors are that are kept for one parameter, its step count aside.

    Args:
        matrices: Those of the parameter.

    Returns:
        By the key in the parameter's state.
    """
    return {
        key + matrix.share.suffix: spec
        for matrix in matrices
        for key, spec in matrix.states.items()
    }


def averages_of(matrices: Iterable[MatrixPlan]) -> dict[int, list[str]]:
    """The averages that each step adds to.

    Args:
        matrices: Those that take part.

    Returns:
        Their keys in the parameter's state, by its position.
    """
    found: dict[int, list[str]] = {}
    for matrix in matrices:
        for key, spec in matrix.states.items():
            keys = found.setdefault(matrix.index, []) if spec.kept == "sum" else []
            if (key := key + matrix.share.suffix) not in keys:  # more of a stack
                keys.append(key)
    return found


def apart(matrix: MatrixPlan, whole: Tensor) -> list[Tensor]:
    """Each matrix of what is moved as one.

    Args:
        matrix: The plan.
        whole: What there is of it.

    Returns:
        Views.
    """
    if matrix.share.kind != "stack":
        return [whole]
    return list(whole.view(matrix.share.count, *matrix.shape).unbind())


def as_one(matrix: MatrixPlan, each: Sequence[Tensor]) -> Tensor:
    """What `apart` has taken apart.

    Args:
        matrix: The plan.
        each: The matrices.

    Returns:
        All in the shape in which they are moved.
    """
    if matrix.share.kind != "stack":
        return each[0]
    one = each[0] if len(each) == 1 else torch.stack(list(each))
    return one.view(matrix.view.rows, matrix.view.cols)
