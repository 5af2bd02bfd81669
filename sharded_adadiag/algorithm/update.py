"""Algorithms 1-3 of the paper on full matrices, in the paper's order.

1. ``G_t``, the gradient of a matrix ``W`` in R^{m x n}
2. every T steps: ``U, S, V^T = SVD(G_t)``;  ``P = U``  (two sides: ``Q = V``);
   a gradient of zeros makes no basis, so the first one may come later; on request
   of what G_t has been added to (`statistic`)
3. ``Gt = P^T G_t Q``
4.-6. the moment rule on ``Gt``: `adam` (AdaDiag), `adafactor` (AdafacDiag),
   `hfac` (HfacDiag); it gives ``N_t``
7. ``W = (1 - eta lam) W - eta P N_t Q^T``, applied by whoever holds ``W``

A side that is not rotated has the identity for its basis, without storing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sharded_adadiag.algorithm.basis import Basis
from sharded_adadiag.algorithm.rotation import (
    Scratch,
    reproject_,
    rotate,
    rotate_back,
    suppress_noise,
)
from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.algorithm.state import Rule, rotated_sides
from sharded_adadiag.algorithm.sums import Sums
from sharded_adadiag.options import Options

State = dict[str, Tensor]


def update(
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    rule: Rule,
    options: Options,
    step: int,
    shape: tuple[int, int],
    sides: tuple[bool, bool],
    scratch: Scratch,
) -> Sums[Tensor]:
    """Steps 3-6 and the rotation back for a batch of matrices of one shape.

    Args:
        grads: G_t of each, ``[m, n]`` or a block of it that is whole along each
            rotated dimension, in the dtype of the computation.
        states: Moments and rotations of each; the moments are modified in place.
        rule: The optimizer.
        options: Its options.
        step: t, counted from 1.
        shape: ``(m, n)`` of the full matrices.
        sides: Whether P, and whether Q, is applied here.
        scratch: Memory for what is made on the way, and for the result.

    Yields:
        Sums over the blocks' entries; the answers are those over full matrices.

    Returns:
        ``P N_t Q^T`` of each, or its block, ``[k, m, n]``.
    """
    left, right = sides
    p = rotations(states, "rotation_left", grads[0]) if left else None
    q = rotations(states, "rotation_right", grads[0]) if right else None
    rotated = rotate(grads, p, q, scratch)
    directions = yield from moment_rule(rule, rotated, states, options, step, shape)
    return rotate_back(directions, p, q, scratch)


def moment_rule(
    rule: Rule,
    rotated: Tensor,
    states: Sequence[State],
    options: Options,
    step: int,
    shape: tuple[int, int],
) -> Sums[Tensor]:
    """Steps 4-6, after entries below the noise floor were dropped.

    Args:
        rule: The optimizer.
        rotated: Gt of each matrix, ``[k, m, n]``, or blocks of them; overwritten.
        states: Moments of each; modified in place.
        options: The optimizer's options.
        step: t, counted from 1.
        shape: ``(m, n)`` of the full matrices.

    Yields:
        Sums over the blocks' entries; the answers are those over full matrices.

    Returns:
        N_t of each.
    """
    floor = options.noise_floor
    if floor > 0.0 and not any(rotated_sides(shape, options)):
        floor = 0.0
    quiet = yield from suppress_noise(rotated, floor)
    return (yield from rule.direction(quiet, states, options, step, shape))


def install(
    state: State, basis: Basis, options: Options, specs: Mapping[str, StateSpec]
) -> None:
    """Put a new basis into a matrix's state.

    Args:
        state: The matrix's state; modified in place.
        basis: The new basis; a side that is None stays as it is.
        options: Its ``on_refresh`` and ``first_moment`` are used. Where there was no
            basis yet the moments are re-expressed from the original frame.
        specs: What the state has.
    """
    squares = options.on_refresh == "reproject"
    follows = {1: squares or options.first_moment == "original", 2: squares}
    following = {k: spec for k, spec in specs.items() if follows.get(spec.power)}
    for key, new in (("rotation_left", basis.left), ("rotation_right", basis.right)):
        if new is None:
            continue
        if following:
            left, old = key == "rotation_left", state[key].to(new.dtype)
            change = new.mT @ old if left else old.mT @ new
            reproject_(state, following, change, left=left)
        state[key].copy_(new)


def lacks_basis(state: State) -> bool:
    """Whether a rotation is still the identity: no gradient but zeros has been seen.

    Reads a few numbers back to the host. A side of one entry has no other basis.

    Args:
        state: The matrix's state, with its rotations.

    Returns:
        True until a basis has been installed (or if that is the identity).
    """
    return any(
        bool((value.diagonal() == 1.0).all())
        and int(value.count_nonzero()) == value.shape[0]
        for key, value in state.items()
        if key.startswith("rotation") and value.shape[0] > 1
    )


def rotations(states: Sequence[State], key: str, like: Tensor) -> list[Tensor] | None:
    """One side's rotations of a batch in the dtype of the computation.

    Args:
        states: The state of each matrix, with square rotations if it has any.
        key: ``"rotation_left"`` or ``"rotation_right"``.
        like: A tensor with the wanted dtype.

    Returns:
        The rotations, or None if this side is not rotated.
    """
    if key not in states[0]:
        return None
    return [state[key].to(like.dtype) for state in states]
