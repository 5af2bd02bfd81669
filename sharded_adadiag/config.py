"""The options of the optimizers: their defaults and their validation, in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Sides = Literal["none", "one", "two"]
Side = Literal["auto", "left", "right"]
OnRefresh = Literal["carry", "reproject"]
Basis = Literal["svd", "eigh"]
Nonfinite = Literal["raise", "skip", "ignore"]
Distribution = Literal["auto", "owner", "broadcast"]

DTYPE_OPTIONS = frozenset({"state_dtype", "rotation_dtype"})
DISTRIBUTIONS: tuple[str, ...] = ("auto", "owner", "broadcast")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What may be set per param group: all but ``distribution`` and the group.

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
            first basis for ever.
        on_refresh: ``"carry"`` keeps the moments as they are when the basis
            changes (the paper); ``"reproject"`` re-expresses them.
        basis: ``"svd"`` of the gradient (the paper), or ``"eigh"`` of its
            float64 Gram matrix.
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
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    sides: Sides = "one"
    side: Side = "auto"
    refresh_every: int | None = 200
    on_refresh: OnRefresh = "carry"
    basis: Basis = "svd"
    max_rotated_dim: int = 8192
    noise_floor: float = 0.0
    nonfinite: Nonfinite = "raise"
    state_dtype: torch.dtype | None = None
    rotation_dtype: torch.dtype | None = None
    maximize: bool = False
    rotate: bool = True
    momentum: bool = True
    clip_threshold: float | None = 1.0

    def __post_init__(self) -> None:
        for name, (test, rule) in _RULES.items():
            value = getattr(self, name)
            if not test(value):
                raise ValueError(f"invalid {name}: got {value!r}, {rule}")

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Options:
        """The options of a param group; its other keys are ignored."""
        return cls(**{k: group[k] for k in OPTION_NAMES if k in group})


def as_dtype(value: Any) -> Any:
    """A dtype by its name in torch, as a config file gives it, or what was given."""
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else value


def _is_number(value: object, low: float, *, strict: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (value > low if strict else value >= low)


def _is_lr(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return _is_number(value, 0.0)


def _are_betas(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(_is_number(b, 0.0) and b < 1.0 for b in value)
    )


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _one_of(*allowed: object) -> tuple[Callable[[Any], bool], str]:
    rule = "it must be one of " + ", ".join(repr(a) for a in allowed)
    return (lambda value: any(value is a or value == a for a in allowed)), rule


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BOOL = _one_of(True, False)
_DTYPE = _one_of(None, *_FLOATS)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_lr, "it must be a number >= 0 or a one-element tensor"),
    "betas": (_are_betas, "it must be two numbers in [0, 1)"),
    "eps": (lambda v: _is_number(v, 0.0), "it must be a number >= 0"),
    "weight_decay": (lambda v: _is_number(v, 0.0), "it must be a number >= 0"),
    "sides": _one_of("none", "one", "two"),
    "side": _one_of("auto", "left", "right"),
    "refresh_every": (
        lambda v: v is None or _is_positive_int(v),
        "it must be an integer >= 1, or None to keep the first basis",
    ),
    "on_refresh": _one_of("carry", "reproject"),
    "basis": _one_of("svd", "eigh"),
    "max_rotated_dim": (_is_positive_int, "it must be an integer >= 1"),
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
}
OPTION_NAMES = tuple(field.name for field in dataclasses.fields(Options))
assert set(_RULES) == set(OPTION_NAMES)
