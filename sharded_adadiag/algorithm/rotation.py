"""Into the rotated basis and back, and moments re-expressed in a new basis.

Each function takes a batch: a list of matrices of one shape. Small ones are
stacked into one batched product; large ones are multiplied one by one, which is as
fast and needs room for one matrix only. Which of the two happens depends on the
shape alone, never on the number of matrices, so that a matrix gets the same bits
whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.algorithm.sums import PartialSum, Sums

# A product of this many elements fills a core's cache, or a GPU, by itself.
STACK_NUMEL = {"cpu": 1 << 15, "cuda": 1 << 20}
# Bytes: where torch's CPU allocator lets a tensor begin.
ALIGNMENT = 64


def rotate(
    grads: Sequence[Tensor],
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
) -> list[Tensor]:
    """``P^T G Q`` (Algorithm 1, step 3); a side that is None is left alone.

    Args:
        grads: Matrices ``[m, n]`` of one shape.
        left: P of each, ``[m, m]``.
        right: Q of each, ``[n, n]``.

    Returns:
        The rotated matrices, ``[m, n]``.
    """
    rotated = list(grads)
    if right is not None:
        rotated = _products(rotated, right)
    if left is not None:
        rotated = _products([p.mT for p in left], rotated)
    return rotated


def rotate_back(
    directions: Sequence[Tensor],
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
) -> list[Tensor]:
    """``P N Q^T`` (Algorithm 1, step 7): the inverse of `rotate`.

    Args:
        directions: Matrices ``[m, n]`` of one shape, in the rotated basis.
        left: P of each, ``[m, m]``.
        right: Q of each, ``[n, n]``.

    Returns:
        The matrices in the original basis, ``[m, n]``.
    """
    back = list(directions)
    if left is not None:
        back = _products(left, back)
    if right is not None:
        back = _products(back, [q.mT for q in right])
    return back


def suppress_noise(rotated: Sequence[Tensor], floor: float) -> Sums[list[Tensor]]:
    """Zero entries below ``floor`` times the Frobenius norm of the whole matrix.

    The norm of the rotated gradient is the gradient's own.

    Args:
        rotated: Rotated gradients ``[m, n]``, or blocks of them.
        floor: A share of the matrix's Frobenius norm, >= 0; 0 changes nothing.

    Yields:
        Sums of squares.

    Returns:
        The matrices without the small entries.
    """
    if floor == 0.0:
        return list(rotated)
    squares = yield [
        PartialSum(g.square().sum(), "all", i) for i, g in enumerate(rotated)
    ]
    return [
        g.masked_fill(g.abs() < floor * total.sqrt(), 0.0)
        for g, total in zip(rotated, squares, strict=True)
    ]


def reproject_(
    state: Mapping[str, Tensor],
    specs: Mapping[str, StateSpec],
    change: Tensor,
    *,
    left: bool,
) -> None:
    """Re-express one matrix's moments in a new basis; ``state`` is modified in place.

    What is linear in the gradient is changed exactly; what is an average of squares by
    the squared entries of the change of basis. A factored statistic of the other
    side does not depend on this side's basis, or (H-Fac's mean
    over the rotated side) cannot be recovered from what is kept: it is carried.

    Args:
        state: The matrix's moments, keyed as in ``optimizer.state``.
        specs: How each of them follows.
        change: ``P_new^T P_old`` or ``Q_old^T Q_new``, ``[k, k]``.
        left: The change is that of rows (P) rather than columns (Q).
    """
    for key, spec in specs.items():
        if not spec.power or ("m" if left else "n") not in spec.dims:
            continue
        moment, by = state[key], change if spec.power == 1 else change.square()
        value = moment.to(by.dtype)
        if left:
            moved = by @ value
        else:
            moved = value @ by if value.dim() > 1 else by.mT @ value
        moment.copy_(moved if spec.power == 1 else _without_nan(moved))


def _without_nan(squares: Tensor) -> Tensor:
    """Second moments in which 0 times infinity is infinite, which stops an entry."""
    return squares.masked_fill(squares.isnan(), torch.inf)


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    rows, inner = first[0].shape
    cols = second[0].shape[1]
    limit = STACK_NUMEL.get(first[0].device.type, STACK_NUMEL["cuda"])
    # Back ends treat a batch of one matrix-vector product as a special case with
    # other rounding, so vectors always go one by one.
    if min(rows, inner, cols) == 1 or rows * cols > limit:
        return [torch.mm(a, b) for a, b in zip(first, second, strict=True)]
    product = _room(len(first), rows, cols, first[0])
    torch.bmm(_stack(first), _stack(second), out=product)
    return list(product.unbind())


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    rows, cols = matrices[0].shape
    stacked = _room(len(matrices), rows, cols, matrices[0])
    torch._foreach_copy_(list(stacked.unbind()), list(matrices))
    return stacked


def _room(count: int, rows: int, cols: int, like: Tensor) -> Tensor:
    """Uninitialised matrices, each where memory of its own would begin."""
    # On some CPUs (MKL on AMD) a small product rounds by the address of its result.
    unit = max(ALIGNMENT // like.element_size(), 1)
    stride = -(-rows * cols // unit) * unit
    room = like.new_empty(count * stride)
    return room.as_strided((count, rows, cols), (stride, cols, 1))
