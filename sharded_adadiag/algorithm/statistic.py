"""What a basis is made of, if not of this step's gradient alone.

* the momentum: the first moment in the original frame with this step's gradient in it,
  ``M = h P M~ Q^T + (1 - h) G``, as the rule averages;
* Gram averages: ``L = b L + (1 - b) G G^T`` and ``R = b R + (1 - b) G^T G``, of the
  rotated sides. They are linear in ``G G^T``, so each rank of a team averages the Gram
  matrices of its own block, and the sum over the ranks is the average. A block that is
  rotated on the other side has the same Gram matrix: ``G Q (G Q)^T = G G^T``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.basis import (
    Basis,
    basis_of_gram,
    compute_basis,
    gram_matrix,
)
from sharded_adadiag.algorithm.rotation import Scratch, products, rotate_back
from sharded_adadiag.options import Options

GRAMS = ("gram_left", "gram_right")


def statistic(
    grad: Tensor, state: Mapping[str, Tensor], options: Options, decay: float
) -> dict[str, Tensor]:
    """What the basis of a step is made of.

    Args:
        grad: G_t, ``[m, n]``, in the dtype of the computation.
        state: Moments, rotations and averages, these with G_t in them.
        options: Its ``basis_from`` is used.
        decay: Weight of the old in the new first moment.

    Returns:
        ``gradient``, which may be a momentum, or ``gram_left`` and ``gram_right`` as
        far as they are kept.
    """
    if options.basis_from == "gram":
        return {key: state[key] for key in GRAMS if key in state}
    if options.basis_from == "momentum":
        return {"gradient": momentum(grad, state["exp_avg"], state, decay)}
    return {"gradient": grad}


def basis_of(
    made: Mapping[str, Tensor],
    *,
    left: bool,
    right: bool,
    method: str,
    dtype: torch.dtype,
) -> Basis:
    """Step 2: the basis of a statistic.

    Args:
        made: As from `statistic`.
        left: Whether P is wanted.
        right: Whether Q is wanted.
        method: ``"svd"`` or ``"eigh"``; of Gram matrices it is always the latter.
        dtype: Dtype of the basis.

    Returns:
        The basis; both sides are None where there is no new one.
    """
    if "gradient" in made:
        grad = made["gradient"].to(dtype)
        return compute_basis(grad, left=left, right=right, method=method)
    if not any(bool(gram.any()) for gram in made.values()):  # zeros tell nothing
        return Basis(None, None)
    found = {key: basis_of_gram(gram.double(), dtype) for key, gram in made.items()}
    if any(vectors is None for vectors in found.values()):
        return Basis(None, None, "kept")
    return Basis(found.get("gram_left"), found.get("gram_right"))


def momentum(
    grad: Tensor, first: Tensor, state: Mapping[str, Tensor], decay: float
) -> Tensor:
    """The first moment after this step, in the original frame.

    Args:
        grad: G, ``[m, n]``.
        first: The first moment before it, in the basis in force.
        state: The rotations of that basis.
        decay: Weight of the old one.

    Returns:
        ``[m, n]``, in the dtype of the gradient.
    """
    p, q = (
        [state[key].to(grad.dtype)] if key in state else None
        for key in ("rotation_left", "rotation_right")
    )
    (moment,) = rotate_back([first.to(grad.dtype)], p, q, Scratch())
    return moment * decay + grad * (1.0 - decay)


def add_grams_(
    states: Sequence[Mapping[str, Tensor]],
    blocks: Sequence[Tensor],
    options: Options,
    *,
    left: bool,
    right: bool,
) -> None:
    """Add the Gram matrices of blocks to averages that have faded already.

    Args:
        states: ``gram_left`` ``[m, m]`` and ``gram_right`` ``[n, n]`` of each matrix;
            modified in place.
        blocks: Of the gradients, of one shape, whole on the wanted sides; the other
            side may be rotated.
        options: Its ``gram_beta`` is used.
        left: Whether ``G G^T`` is added.
        right: Whether ``G^T G`` is added.
    """
    for key, wanted in ("gram_left", left), ("gram_right", right):
        if wanted:
            own = [block.to(state[key].dtype) for block, state in zip(blocks, states)]
            turned = [block.mT for block in own]
            pair = (own, turned) if key == "gram_left" else (turned, own)
            grams = products(*pair, Scratch())
            for state, gram in zip(states, grams):
                state[key].add_(gram.mul_(1.0 - options.gram_beta))


def with_gradient(average: Tensor, grad: Tensor, options: Options, key: str) -> Tensor:
    """A faded average with this step's gradient in it, in float64.

    Args:
        average: ``[k, k]``, or a summand of it.
        grad: The gradient, or a block that is whole on that side.
        options: Its ``gram_beta`` is used.
        key: ``"gram_left"`` or ``"gram_right"``.

    Returns:
        A new tensor ``[k, k]``.
    """
    gram = gram_matrix(grad, left=key == "gram_left")
    return average.double() + gram.mul_(1.0 - options.gram_beta)
