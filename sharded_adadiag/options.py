"""The options of the optimizers: their defaults and their validation, in one place."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Sides = Literal["none", "one", "two"]
Side = Literal["auto", "left", "right"]
OnRefresh = Literal["carry", "reproject"]
Basis = Literal["svd", "eigh"]
RefreshSlots = int | Literal["auto"]
BasisFrom = Literal["gradient", "momentum", "gram"]
FirstMoment = Literal["rotated", "original"]
Nonfinite = Literal["raise", "skip", "ignore"]
Distribution = Literal["auto", "owner", "broadcast"]

DTYPE_OPTIONS = frozenset({"state_dtype", "rotation_dtype"})
# What is set per group only: an optimizer has no default of them, so a state dict has
# them just for the groups in which they are set.
GROUP_OPTIONS = frozenset({"rotate", "batch_dims", "split_rows"})
# Checkpoints that torch flattens cannot be read by whoever has a key more than they. So
# groups have these, which are younger than the first checkpoints, only where they are
# not the default.
LATER_OPTIONS = frozenset({
    "refresh_slots",
    "refresh_lag",
    "basis_from",
    "gram_beta",
    "first_moment",
})
DISTRIBUTIONS: tuple[str, ...] = ("auto", "owner", "broadcast")
# What the exchanges of a step may take on each rank unless the user says otherwise.
BUFFER_BYTES = 44 << 20


def _planned(default: Any) -> Any:
    """An option that decides what is kept where; it cannot change afterwards."""
    return dataclasses.field(default=default, metadata={"planned": True})


def _steering(default: Any) -> Any:
    """An option that decides which collectives are made; all ranks must have one."""
    return dataclasses.field(default=default, metadata={"steering": True})


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What may be set per param group: all but ``distribution`` and the group.

    The plan is made from ``rotate``, ``sides``, ``side``, ``refresh_slots``,
    ``refresh_lag``, ``basis_from``, ``first_moment``, ``momentum``, ``state_dtype``,
    ``rotation_dtype``, ``max_rotated_dim``, ``batch_dims`` and ``split_rows``, which
    then stay as they are. All others may be changed between steps. The last two are
    set per group only, where they are wanted.

    Attributes:
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the first and the second moment, each in [0, 1).
        eps: Added to the bias-corrected square root of the second moment.
        weight_decay: Decoupled weight decay, as in ``torch.optim.AdamW``.
        sides: ``"none"`` is the base method, ``"one"`` rotates one side
            (AdaDiag), ``"two"`` both (AdaDiag++).
        side: The side rotated when ``sides="one"``; ``"auto"`` is the smaller
            one (left for square matrices).
        refresh_every: Steps between two bases (T of the paper); None keeps the
            first basis for ever. A gradient of zeros makes none: the first one
            comes with the first gradient that is not zero.
        refresh_slots: In how many portions, spread over the period, the matrices get
            their new bases (`plan.schedule`); 1 is the paper: all in one step. With
            ``"auto"`` the plan takes a number, and the group has it from then on.
        refresh_lag: Steps from a gradient to the one from which its basis is in force
            (`step.pending`): meanwhile it is computed beside training. 0 is the paper:
            the same step. A first basis is never late.
        on_refresh: ``"carry"`` keeps the moments as they are when the basis
            changes (the paper); ``"reproject"`` re-expresses them.
        basis: ``"svd"`` of the gradient (the paper), or ``"eigh"`` of its
            float64 Gram matrix.
        basis_from: What a basis is made of: this step's ``"gradient"`` (the paper);
            the ``"momentum"``, the first moment with this step's gradient in it; or
            ``"gram"``, moving averages of ``G G^T`` and ``G^T G`` on the rotated
            sides, of which a basis is always the eigenvectors.
        gram_beta: Decay rate of those averages.
        first_moment: ``"rotated"`` lives in whatever basis is in force and is carried
            over to the next (the paper); ``"original"`` is re-expressed in each new
            basis, as if it were kept in the original frame and rotated at each step.
        max_rotated_dim: A matrix whose rotated dimension is larger is not
            rotated: it gets plain unfactored Adam.
        noise_floor: Entries of the rotated gradient smaller than this times
            the gradient's Frobenius norm are set to zero; 0 is the paper.
        nonfinite: On NaN or Inf in a gradient: ``"raise"`` on every rank,
            ``"skip"`` the step on every rank, or ``"ignore"`` (no check and no
            agreement between ranks).
        state_dtype: Dtype of the moments, or its name; None is the parameter's.
        rotation_dtype: Dtype of the rotations, or its name; None is the moments'.
        maximize: Ascend instead of descend.
        rotate: Whether the group's matrices are rotated at all.
        momentum: AdafacDiag only: keep a first moment.
        clip_threshold: AdafacDiag and HfacDiag only: the RMS the normalised
            update is clipped to (d of Adafactor); None switches it off.
        batch_dims: Leading dimensions that count matrices: with 1, a parameter
            ``(E, m, n)`` is E matrices, each with a basis of its own. Parameters of
            up to two dimensions are what they are without it.
        split_rows: Rows of the matrices that lie one under the other in each of the
            group's parameters (fused projections), each with a basis of its own;
            None for one matrix. Vectors are what they are without it.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    sides: Sides = _planned("one")
    side: Side = _planned("auto")
    refresh_every: int | None = _steering(200)
    refresh_slots: RefreshSlots = _planned(1)
    refresh_lag: int = _planned(0)
    on_refresh: OnRefresh = _steering("carry")
    basis: Basis = _steering("svd")
    basis_from: BasisFrom = _planned("gradient")
    gram_beta: float = 0.95
    first_moment: FirstMoment = _planned("rotated")
    max_rotated_dim: int = _planned(8192)
    noise_floor: float = _steering(0.0)
    nonfinite: Nonfinite = _steering("raise")
    state_dtype: torch.dtype | None = _planned(None)
    rotation_dtype: torch.dtype | None = _planned(None)
    maximize: bool = False
    rotate: bool = _planned(True)
    momentum: bool = _planned(True)
    clip_threshold: float | None = _steering(1.0)
    batch_dims: int = _planned(0)
    split_rows: Sequence[int] | None = _planned(None)

    def __post_init__(self) -> None:
        for name, (test, rule) in _RULES.items():
            value = getattr(self, name)
            if not test(value):
                raise ValueError(f"invalid {name}: got {value!r}, {rule}")
        every, slots = self.refresh_every, self.refresh_slots
        if every is not None and slots != "auto" and slots > every:
            raise ValueError(
                f"invalid refresh_slots: got {slots!r}, it must be at most "
                f"refresh_every, which is {every!r}"
            )
        if every is not None and self.refresh_lag >= every:
            raise ValueError(
                f"invalid refresh_lag: got {self.refresh_lag!r}, it must be less than "
                f"refresh_every, which is {every!r}"
            )
        if self.split_rows is not None:  # it is compared, and a key of caches
            object.__setattr__(self, "split_rows", tuple(self.split_rows))

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Options:
        """The options of a param group as plain numbers; its other keys are ignored."""
        own = {k: as_number(group[k]) for k in OPTION_NAMES if k in group}
        lr = own.get("lr")
        if isinstance(lr, Tensor) and lr.numel() == 1:
            own["lr"] = float(lr)  # once a step: on a GPU the host waits for it
        for name in DTYPE_OPTIONS & set(own):
            own[name] = as_dtype(own[name])
        return cls(**own)


def as_number(value: Any) -> Any:
    """Scalars of numpy as Python's own, also in a pair; all else as it is.

    Saved with a checkpoint they could not be loaded with ``weights_only=True``, and
    their arithmetic stays in their own precision.

    Args:
        value: Any value of an option.

    Returns:
        The same value.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(as_number(v) for v in value)
    scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if scalar and not isinstance(value, Tensor) else value


def name_dtypes(group: dict[str, Any]) -> None:
    """Make dtypes their names, in place: torch's state-dict helpers carry no dtypes."""
    for key in DTYPE_OPTIONS & set(group):
        value = as_dtype(group[key])
        if isinstance(value, torch.dtype):
            group[key] = str(value).removeprefix("torch.")


def as_dtype(value: Any) -> Any:
    """A dtype by its name in torch, as a group keeps it, or what was given."""
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else value


def _is_number(value: object, low: float, *, strict: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    value = float(value)
    return math.isfinite(value) and (value > low if strict else value >= low)


def _is_lr(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and _is_number(float(value), 0.0)
    return _is_number(value, 0.0)


def _are_betas(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(_is_number(b, 0.0) and b < 1.0 for b in value)
    )


def is_positive_int(value: object) -> bool:
    """Whether a value is an integer >= 1, of Python or numpy."""
    return _is_number(value, 1.0) and isinstance(value, numbers.Integral)


def _is_count(value: object) -> bool:
    return _is_number(value, 0.0) and isinstance(value, numbers.Integral)


def _are_row_counts(value: object) -> bool:
    if not isinstance(value, (tuple, list)):
        return value is None
    return len(value) > 0 and all(is_positive_int(rows) for rows in value)


def _one_of(*allowed: object) -> tuple[Callable[[Any], bool], str]:
    rule = "it must be one of " + ", ".join(repr(a) for a in allowed)
    return (lambda value: any(value is a or value == a for a in allowed)), rule


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BOOL = _one_of(True, False)
_DTYPE = _one_of(None, *_FLOATS)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_lr, "it must be a number >= 0 or a tensor with one such number"),
    "betas": (_are_betas, "it must be two numbers in [0, 1)"),
    "eps": (lambda v: _is_number(v, 0.0), "it must be a number >= 0"),
    "weight_decay": (lambda v: _is_number(v, 0.0), "it must be a number >= 0"),
    "sides": _one_of("none", "one", "two"),
    "side": _one_of("auto", "left", "right"),
    "refresh_every": (
        lambda v: v is None or is_positive_int(v),
        "it must be an integer >= 1, or None to keep the first basis",
    ),
    "refresh_slots": (
        lambda v: is_positive_int(v) or (isinstance(v, str) and v == "auto"),
        'it must be an integer >= 1, or "auto"',
    ),
    "refresh_lag": (_is_count, "it must be an integer >= 0"),
    "on_refresh": _one_of("carry", "reproject"),
    "basis": _one_of("svd", "eigh"),
    "basis_from": _one_of("gradient", "momentum", "gram"),
    "gram_beta": (
        lambda v: _is_number(v, 0.0) and float(v) < 1.0,
        "it must be a number in [0, 1)",
    ),
    "first_moment": _one_of("rotated", "original"),
    "max_rotated_dim": (is_positive_int, "it must be an integer >= 1"),
    "noise_floor": (lambda v: _is_number(v, 0.0), "it must be a number >= 0"),
    "nonfinite": _one_of("raise", "skip", "ignore"),
    "state_dtype": _DTYPE,
    "rotation_dtype": _DTYPE,
    "maximize": _BOOL,
    "rotate": _BOOL,
    "momentum": _BOOL,
    "clip_threshold": (
        lambda v: v is None or _is_number(v, 0.0, strict=True),
        "it must be a number > 0, or None to switch clipping off",
    ),
    "batch_dims": (_is_count, "it must be an integer >= 0"),
    "split_rows": (
        _are_row_counts,
        "it must be a list of integers >= 1, or None for one matrix",
    ),
}
_FIELDS = dataclasses.fields(Options)
DEFAULTS = {field.name: field.default for field in _FIELDS}
OPTION_NAMES = tuple(field.name for field in _FIELDS)
PLANNED = tuple(field.name for field in _FIELDS if "planned" in field.metadata)
STEERING = tuple(field.name for field in _FIELDS if "steering" in field.metadata)
assert set(_RULES) == set(OPTION_NAMES)
