"""What each method keeps for a parameter: names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.algorithm.adafactor import adafactor
from sharded_adadiag.algorithm.adam import adam
from sharded_adadiag.algorithm.hfac import hfac
from sharded_adadiag.algorithm.sums import Sums, each
from sharded_adadiag.options import Options

MATRIX, ROW, COL = ("m", "n"), ("m",), ("n",)


class Rule(NamedTuple):
    """One of the three optimizers, as far as a matrix is concerned.

    Attributes:
        name: The class's name, used in error messages.
        factored: Whether the base method needs the whole matrix even unrotated.
        rule: The moment rule (steps 4-6).
        moments: Names of the moments of a matrix under `rule`, each with the
            dimensions of its shape.
        options: Options that only this optimizer has, with their defaults.
    """

    name: str
    factored: bool
    rule: Callable[..., Sums[list[Tensor]]]
    moments: dict[str, tuple[str, ...]]
    options: dict[str, Any]


_SECOND = {"exp_avg_sq_row": ROW, "exp_avg_sq_col": COL}
ADADIAG = Rule("AdaDiag", False, adam, {"exp_avg": MATRIX, "exp_avg_sq": MATRIX}, {})
ADAFACDIAG = Rule(
    "AdafacDiag",
    True,
    each(adafactor),
    {"exp_avg": MATRIX, **_SECOND},
    {"momentum": True, "clip_threshold": 1.0},
)
HFACDIAG = Rule(
    "HfacDiag",
    True,
    each(hfac),
    {"exp_avg_row": ROW, "exp_avg_col": COL, **_SECOND},
    {"clip_threshold": 1.0},
)


def matrix_moments(method: Rule, options: Options) -> dict[str, tuple[str, ...]]:
    """Moments of a rotated (or factored) matrix.

    Args:
        method: The optimizer.
        options: Its ``momentum`` is used.

    Returns:
        Names and dimensions.
    """
    moments = dict(method.moments)
    if not options.momentum and method is ADAFACDIAG:
        del moments["exp_avg"]
    return moments


def plain_moments(method: Rule, options: Options) -> tuple[str, ...]:
    """Moments of a parameter updated where it lies; each has its local shape.

    Args:
        method: The optimizer.
        options: Its ``momentum`` is used.

    Returns:
        Their names.
    """
    if not options.momentum and method is ADAFACDIAG:
        return ("exp_avg_sq",)
    return ("exp_avg", "exp_avg_sq")


def moment_dtype(options: Options, parameter: torch.dtype) -> torch.dtype:
    """Dtype of the moments: as asked for, else the parameter's (as torch.optim).

    Args:
        options: Its ``state_dtype`` is used.
        parameter: The parameter's dtype.

    Returns:
        The dtype.
    """
    return options.state_dtype or parameter


def rotation_dtype(options: Options, parameter: torch.dtype) -> torch.dtype:
    """Dtype of the rotations: as asked for, else the moments'.

    Args:
        options: Its ``rotation_dtype`` and ``state_dtype`` are used.
        parameter: The parameter's dtype.

    Returns:
        The dtype.
    """
    return options.rotation_dtype or moment_dtype(options, parameter)


def rotated_sides(shape: tuple[int, int], options: Options) -> tuple[bool, bool]:
    """Which sides of a matrix are rotated.

    One side is the smaller one, left for a square matrix (paper, section 3.3),
    unless the group forces it.

    Args:
        shape: Rows and columns of the matrix view.
        options: Its ``rotate``, ``sides``, ``side`` and ``max_rotated_dim`` are used.

    Returns:
        ``(left, right)``; both False for a matrix whose rotated dimension is over
        ``max_rotated_dim``.
    """
    rows, cols = shape
    if not options.rotate or options.sides == "none":
        return False, False
    if options.sides == "two":
        left = right = True
    else:
        left = rows <= cols if options.side == "auto" else options.side == "left"
        right = not left
    dim = max(rows if left else 0, cols if right else 0)
    return (left, right) if dim <= options.max_rotated_dim else (False, False)
