"""What ranks tell each other of their parameters, and what must agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.options import Options
from sharded_adadiag.params.local import Holding, Piece
from sharded_adadiag.plan.spec import ParamSpec


def names(groups: list[dict[str, Any]], group: dict[str, Any]) -> list[str]:
    """Names of a group's parameters: the user's, or their positions.

    Args:
        groups: All groups of the optimizer.
        group: One of them.

    Returns:
        A name for each of its parameters.
    """
    given = group.get("param_names")
    if given is not None:
        return list(given)
    before = 0
    for other in groups:
        if other is group:
            break
        before += len(other["params"])
    return [f"parameter {before + i}" for i in range(len(group["params"]))]


def is_trained(param: Tensor) -> bool:
    """As in torch.optim, a parameter without requires_grad may have a gradient."""
    return param.requires_grad or param.grad is not None


def check_parameter(name: str, param: Tensor, method: Rule) -> None:
    """Refuse what no method can update.

    Args:
        name: Of the parameter.
        param: The parameter.
        method: The optimizer.

    Raises:
        TypeError: For integer, complex and sparse parameters.
    """
    if not param.is_floating_point():
        kind = "complex" if param.is_complex() else "integer"
        raise TypeError(
            f"{name}: {method.name} needs real floating-point parameters, got "
            f"{kind} dtype {param.dtype}; leave it out of the optimizer"
            + (" or pass torch.view_as_real of it" if kind == "complex" else "")
        )
    if param.layout is not torch.strided:
        raise TypeError(
            f"{name}: {method.name} needs dense parameters, got layout {param.layout}"
        )


Published = tuple[str, list[tuple[ParamSpec, Holding]]]


def publish(find: Callable[[], list[Piece]]) -> tuple[list[Piece], Published]:
    """This rank's new parameters, and what it tells the others of them.

    Args:
        find: Gives the pieces.

    Returns:
        The pieces and, for the others, an error that keeps this rank from describing
        them (or "") and the description.
    """
    try:
        pieces = find()
        described = []
        for piece in pieces:
            options = Options.from_group(piece.group)
            # The learning rate is no part of the plan, and may be a tensor.
            rotate = options.rotate and piece.rotate
            options = dataclasses.replace(options, lr=0.0, rotate=rotate)
            dtypes = piece.dtype, piece.grad_dtype
            held = piece.holding
            facts = ParamSpec(piece.name, held.shape, *dtypes, options)
            if held.cols != facts.stored[1]:
                facts = dataclasses.replace(facts, width=held.cols)
            described.append((facts, held))
    except (NotImplementedError, ValueError) as error:
        return [], (str(error), [])
    return pieces, ("", described)


def raise_on_mismatch(published: list[Published], kind: str) -> None:
    """Compare what the ranks told; all see the same, so all raise the same error.

    Args:
        published: By rank.
        kind: Of the parameters, for messages.

    Raises:
        ValueError: For the first difference.
    """
    for rank, (error, _) in enumerate(published):
        if error:
            raise ValueError(f"rank {rank}: {error}")
    first = [facts for facts, _ in published[0][1]]
    for rank, (_, described) in enumerate(published):
        if len(described) != len(first):
            raise ValueError(
                f"rank 0 has {len(first)} {kind} parameters and rank {rank} has "
                f"{len(described)}; every rank of the group must pass the same ones "
                "(pipeline stages and experts: each with its own process_group=)"
            )
        for i, ((facts, _), wanted) in enumerate(zip(described, first)):
            if facts != wanted:
                raise ValueError(
                    f"parameter {i} differs: rank 0 has {wanted.name!r} of shape "
                    f"{wanted.shape}, {wanted.dtype}, rank {rank} has {facts.name!r} "
                    f"of shape {facts.shape}, {facts.dtype}"
                    + (
                        ""
                        if facts.grad_dtype == wanted.grad_dtype
                        else f" with gradients in {facts.grad_dtype} instead of "
                        f"{wanted.grad_dtype}"
                    )
                    + (
                        ""
                        if facts.options == wanted.options
                        else f" with options {facts.options} instead of "
                        f"{wanted.options}"
                    )
                    + "; every rank of the group must pass the same parameters in "
                    "the same order"
                )
