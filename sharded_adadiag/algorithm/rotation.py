"""Into the rotated basis and back, and moments re-expressed in a new basis.

A batch is some matrices of one shape. Small ones are stacked into one batched product;
large ones are multiplied one by one, which is as fast and copies none of them. Which
of the two happens depends on the shape alone, never on the number of matrices, so that
a matrix gets the same bits whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.spec import StateSpec
from sharded_adadiag.algorithm.sums import PartialSum, Sums, sums_of_all

# A product of this many elements fills a core's cache, or a GPU, by itself.
STACK_NUMEL = {"cpu": 1 << 15, "cuda": 1 << 20}
# Bytes: where torch's CPU allocator lets a tensor begin.
ALIGNMENT = 64
# ``[m, n]`` each, or ``[k, m, n]`` as `Scratch` gives them.
Matrices = Sequence[Tensor] | Tensor


class Scratch:
    """Memory for the matrices of a batch on their way; the next batch overwrites it.

    There are two places, given in turn, so that a product is never written over what
    it is made of. Both grow to the largest batch, and are kept.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[object, ...], Tensor] = {}
        self._turn = False

    def take(self, count: int, rows: int, cols: int, like: Tensor) -> Tensor:
        """The place that was not given last, uninitialised.

        Args:
            count: How many matrices.
            rows: Rows of each.
            cols: Columns of each.
            like: A tensor of the wanted dtype and device.

        Returns:
            ``[count, rows, cols]``; each matrix begins where memory of its own would.
        """
        self._turn = not self._turn
        key = self._turn, like.dtype, like.device
        # On some CPUs (MKL on AMD) a small product rounds by the address of its result.
        unit = max(ALIGNMENT // like.element_size(), 1)
        stride = -(-rows * cols // unit) * unit
        place = self._places.get(key)
        if place is None or place.numel() < count * stride:
            self._places.pop(key, None)
            place = self._places[key] = like.new_empty(count * stride)
        return place.as_strided((count, rows, cols), (stride, cols, 1))


def rotate(
    grads: Matrices,
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
    scratch: Scratch,
) -> Tensor:
    """``P^T G Q`` (Algorithm 1, step 3); a side that is None is left alone.

    Args:
        grads: Matrices ``[m, n]`` of one shape.
        left: P of each, ``[m, m]``.
        right: Q of each, ``[n, n]``.
        scratch: Memory for the result.

    Returns:
        The rotated matrices, ``[k, m, n]``, or a copy of the gradients.
    """
    if right is not None:
        grads = products(grads, right, scratch)
    if left is not None:
        grads = products([p.mT for p in left], grads, scratch)
    return _in_one(grads, scratch)


def rotate_back(
    directions: Matrices,
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
    scratch: Scratch,
) -> Tensor:
    """``P N Q^T`` (Algorithm 1, step 7): the inverse of `rotate`.

    Args:
        directions: Matrices in the rotated basis, ``[k, m, n]``.
        left: P of each, ``[m, m]``.
        right: Q of each, ``[n, n]``.
        scratch: Memory for the result: that which `rotate` has used.

    Returns:
        The matrices in the original basis, ``[k, m, n]``.
    """
    if left is not None:
        directions = products(left, directions, scratch)
    if right is not None:
        directions = products(directions, [q.mT for q in right], scratch)
    return _in_one(directions, scratch)


def suppress_noise(rotated: Tensor, floor: float) -> Sums[Tensor]:
    """Zero entries below ``floor`` times the Frobenius norm of the whole matrix.

    The norm of the rotated gradient is the gradient's own.

    Args:
        rotated: Rotated gradients ``[k, m, n]``, or blocks of them; modified in place.
        floor: A share of the matrix's Frobenius norm, >= 0; 0 changes nothing.

    Yields:
        Sums of squares.

    Returns:
        The matrices without the small entries.
    """
    if floor == 0.0:
        return rotated
    (total,) = yield [PartialSum(sums_of_all(rotated.square()), "all")]
    small = rotated.abs() < (floor * total.sqrt())[:, None, None]
    return rotated.masked_fill_(small, 0.0)


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
        specs: Those that follow, by the change or by its squares.
        change: ``P_new^T P_old`` or ``Q_old^T Q_new``, ``[k, k]``.
        left: The change is that of rows (P) rather than columns (Q).
    """
    for key, spec in specs.items():
        if ("m" if left else "n") not in spec.dims:
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


def products(
    first: Sequence[Tensor] | Tensor,
    second: Sequence[Tensor] | Tensor,
    scratch: Scratch,
) -> Tensor:
    """``A B`` of each pair of matrices.

    Args:
        first: Matrices ``[m, k]`` of one shape.
        second: As many matrices ``[k, n]`` of one shape.
        scratch: Memory for the result.

    Returns:
        The products, ``[count, m, n]``.
    """
    rows, inner = first[0].shape
    cols = second[0].shape[1]
    limit = STACK_NUMEL.get(first[0].device.type, STACK_NUMEL["cuda"])
    product = scratch.take(len(first), rows, cols, first[0])
    # Back ends treat a batch of one matrix-vector product as a special case with
    # other rounding, so vectors always go one by one.
    if min(rows, inner, cols) == 1 or rows * cols > limit:
        for a, b, out in zip(first, second, product.unbind(), strict=True):
            torch.mm(a, b, out=out)
    else:
        torch.bmm(_in_one(first, Scratch()), _in_one(second, Scratch()), out=product)
    return product


def _in_one(matrices: Matrices, scratch: Scratch) -> Tensor:
    """Themselves if they lie in one place, else copies that do."""
    if isinstance(matrices, Tensor):
        return matrices
    rows, cols = matrices[0].shape
    copies = scratch.take(len(matrices), rows, cols, matrices[0])
    torch._foreach_copy_(list(copies.unbind()), list(matrices))
    return copies
