"""What each rule is and keeps, and which sides of a matrix are rotated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_adadiag.algorithm.adafactor import adafactor, corrected_decay
from sharded_adadiag.algorithm.adam import adam
from sharded_adadiag.algorithm.hfac import hfac
from sharded_adadiag.algorithm.spec import NEXT_ROTATIONS, StateSpec
from sharded_adadiag.algorithm.sums import Sums
from sharded_adadiag.options import Options


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One of the optimizers, as far as a matrix is concerned.

    Attributes:
        name: The class's name, used in error messages.
        direction: Steps 4-6 for a batch: from the rotated gradients, in whose place it
            may write, to the directions.
        moments: What `direction` keeps, by the key in the parameter's state.
        factored: `direction` asks for sums over the whole matrix. So a parameter is
            seen as a matrix even if it is not rotated, and no line of it goes alone.
        options: Options that only this optimizer has, with their defaults.
        first_decay: From beta1 and t, the weight of the old in the new first moment;
            None if there is no whole first moment.
    """

    name: str
    direction: Callable[..., Sums[Tensor]]
    moments: Mapping[str, StateSpec]
    factored: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first_decay: Callable[[float, int], float] | None = None

    def check(self, options: Options) -> None:
        """Refuse options that are valid by themselves but not for this rule.

        Args:
            options: Those of a param group.

        Raises:
            ValueError: If a basis is wanted of a first moment that is not kept.
        """
        kept = self.first_decay is not None and self._has_first(options)
        if options.basis_from == "momentum" and not kept:
            reason = "with momentum=False" if self.first_decay else "by its rule"
            raise ValueError(
                f"invalid basis_from: got 'momentum', but {self.name} keeps no whole "
                f"first moment {reason}; it must be 'gradient' or 'gram'"
            )

    def decay_of_first(self, options: Options, step: int) -> float:
        """The weight of the old in the new first moment, t counted from 1; or 0."""
        return self.first_decay(options.betas[0], step) if self.first_decay else 0.0

    def states(
        self, options: Options, *, left: bool, right: bool
    ) -> Mapping[str, StateSpec]:
        """Everything that is kept of a rotated (or factored) matrix but its step count.

        Args:
            options: Its ``momentum``, ``basis_from`` and ``refresh_lag`` are used.
            left: P is applied.
            right: Q is applied.

        Returns:
            The table, by the key in the parameter's state.
        """
        gram, late = options.basis_from == "gram", options.refresh_lag > 0
        return _states(self, self._has_first(options), (gram, late), (left, right))

    def plain_states(self, options: Options) -> tuple[str, ...]:
        """What is kept of a parameter that is updated by Adam where it lies.

        Args:
            options: Its ``momentum`` is used.

        Returns:
            The keys; each tensor has the parameter's local shape.
        """
        if self._has_first(options):
            return ("exp_avg", "exp_avg_sq")
        return ("exp_avg_sq",)

    def _has_first(self, options: Options) -> bool:
        return options.momentum or "momentum" not in self.options


@functools.cache
def _states(
    rule: Rule, first: bool, more: tuple[bool, bool], sides: tuple[bool, bool]
) -> Mapping[str, StateSpec]:
    """One table for all matrices alike: a plan may have thousands."""
    states = {k: spec for k, spec in rule.moments.items() if first or k != "exp_avg"}
    rotated = [(i, "mn"[i], ("left", "right")[i]) for i in (0, 1) if sides[i]]
    for _, dim, side in rotated:
        states[f"rotation_{side}"] = StateSpec((dim, dim), "copy")
    gram, late = more
    for i, dim, side in rotated:
        if gram:
            states[f"gram_{side}"] = StateSpec((dim, dim), "sum")
        if late:
            states[NEXT_ROTATIONS[i]] = StateSpec((dim, dim), "head")
    return states


_FIRST = StateSpec(("m", "n"), power=1)
# H-Fac's means over the rotated side cannot be re-expressed: they do not follow it.
_FIRST_MEANS = {
    "exp_avg_row": StateSpec(("m",), power=1),
    "exp_avg_col": StateSpec(("n",), power=1),
}
_SQUARE_SUMS = {
    "exp_avg_sq_row": StateSpec(("m",), power=2),
    "exp_avg_sq_col": StateSpec(("n",), power=2),
}
ADADIAG = Rule(
    "AdaDiag",
    adam,
    {"exp_avg": _FIRST, "exp_avg_sq": StateSpec(("m", "n"), power=2)},
    first_decay=lambda beta, step: beta,
)
ADAFACDIAG = Rule(
    "AdafacDiag",
    adafactor,
    {"exp_avg": _FIRST, **_SQUARE_SUMS},
    factored=True,
    options={"momentum": True, "clip_threshold": 1.0},
    first_decay=corrected_decay,
)
HFACDIAG = Rule(
    "HfacDiag",
    hfac,
    {**_FIRST_MEANS, **_SQUARE_SUMS},
    factored=True,
    options={"clip_threshold": 1.0},
)


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
