"""Which parameters there are: their names, and what no method can update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.algorithm.state import Rule


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


def check_parameter(name: str, param: Tensor, rule: Rule) -> None:
    """Refuse what no method can update.

    Args:
        name: The parameter's name, for the message.
        param: The parameter.
        rule: The optimizer's rule, which has its name.

    Raises:
        TypeError: For integer, complex and sparse parameters.
    """
    if not param.is_floating_point():
        kind = "complex" if param.is_complex() else "integer"
        raise TypeError(
            f"{name}: {rule.name} needs real floating-point parameters, got "
            f"{kind} dtype {param.dtype}; leave it out of the optimizer"
            + (" or pass torch.view_as_real of it" if kind == "complex" else "")
        )
    if param.layout is not torch.strided:
        raise TypeError(
            f"{name}: {rule.name} needs dense parameters, got layout {param.layout}"
        )
