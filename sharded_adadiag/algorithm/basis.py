"""The rotation: an orthonormal basis that diagonalises the gradient's covariance.

Step 2 of Algorithms 1-3 of the paper: ``U, S, V^T = SVD(G)``, ``P = U`` and, for
two sides, ``Q = V``. ``eigh`` of the float64 Gram matrix gives the same spaces
with more accurate small directions and never needs the other side.

Only the short side of a rectangular matrix is decomposed: by the SVD of its
triangular factor or by ``eigh`` of the smaller Gram matrix. The long side, where it is
wanted, is what the gradient makes of the short one, completed by Householder's
reflections. So the null space, of which nothing is known but that it is orthogonal to
the rest, has one basis too.

The sign of a singular pair is arbitrary. It is fixed here, so that no result
depends on LAPACK or cuSOLVER: the entry of largest magnitude of each left vector
is positive and its partner follows; a vector without a partner obeys the rule
itself.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class Basis(NamedTuple):
    """The outcome of one decomposition.

    Attributes:
        left: P, ``[m, m]`` with orthonormal columns, or None: keep what there is.
        right: Q, ``[n, n]`` with orthonormal columns, or None: keep what there is.
        fallback: Empty if the wanted method worked, ``"eigh"`` if that stepped in
            for the SVD, ``"kept"`` if nothing worked and both sides are None.
    """

    left: Tensor | None
    right: Tensor | None
    fallback: Literal["", "eigh", "kept"] = ""

    @property
    def made(self) -> bool:
        """Whether there is a new basis."""
        return self.left is not None or self.right is not None


def compute_basis(grad: Tensor, *, left: bool, right: bool, method: str) -> Basis:
    """The basis of the current gradient (paper, section 3 and Algorithm 1, step 2).

    Args:
        grad: ``[m, n]``, float32 or float64; the decomposition runs in its dtype.
        left: Whether P is wanted.
        right: Whether Q is wanted.
        method: ``"svd"`` or ``"eigh"``.

    Returns:
        The basis in ``grad``'s dtype. An SVD that raises or returns
        non-finite vectors is replaced by ``eigh``; if that fails as well the
        result says ``"kept"`` and the caller keeps what it has. So it does, without
        a word, if the gradient is zero: that tells nothing of a basis.
    """
    # LAPACK may return garbage for Inf without an error, so both the input and
    # the result are tested instead of relying on exceptions.
    largest = float(torch.linalg.vector_norm(grad, math.inf)) if grad.numel() else 0.0
    if largest == 0.0:
        return Basis(None, None)
    if math.isfinite(largest):
        grad = grad * _scale(largest, grad.dtype)
        for attempt in ("svd", "eigh") if method == "svd" else ("eigh",):
            try:
                basis = _decompose(grad, left, right, attempt)
            except LinAlgError:
                continue
            if all(bool(torch.isfinite(q).all()) for q in basis if q is not None):
                fallback: Literal["", "eigh"] = "" if attempt == method else "eigh"
                return Basis(*basis, fallback)
    return Basis(None, None, "kept")


def basis_of_gram(gram: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Eigenvectors of a Gram matrix, largest eigenvalue first.

    Args:
        gram: ``[k, k]``, symmetric, float64: ``G G^T`` or ``G^T G``.
        dtype: Dtype of the eigenvectors that are returned.

    Returns:
        ``[k, k]`` with orthonormal columns, or None if there is no finite result.
    """
    # eigh of a non-finite matrix of 128 rows or more raises nothing.
    if not bool(torch.isfinite(gram).all()):
        return None
    try:
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    except LinAlgError:
        return None
    vectors = (vectors * _signs(vectors)).to(dtype).contiguous()
    return vectors if bool(torch.isfinite(vectors).all()) else None


def gram_matrix(grad: Tensor, *, left: bool) -> Tensor:
    """``G G^T`` (left) or ``G^T G`` in float64; a float32 one is not accurate enough.

    Args:
        grad: ``[m, n]``, or a block of it that is whole on the wanted side.
        left: ``G G^T`` rather than ``G^T G``.

    Returns:
        ``[m, m]`` or ``[n, n]``, float64.
    """
    grad = grad.double()
    return grad @ grad.mT if left else grad.mT @ grad


def _scale(largest: float, dtype: torch.dtype) -> float:
    """Brings the largest entry near 1, so that norms neither overflow nor vanish.

    Returns:
        A power of two, which changes no digit.
    """
    limit = 126 if dtype == torch.float32 else 1022
    exponent = math.frexp(largest)[1]
    return math.ldexp(1.0, -max(-limit, min(limit, exponent)))


def _signs(vectors: Tensor) -> Tensor:
    """+1 or -1 per column, that makes its entry of largest magnitude positive."""
    if vectors.numel() == 0:
        return vectors.new_ones(vectors.shape[1])
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _decompose(
    grad: Tensor, left: bool, right: bool, method: str
) -> tuple[Tensor | None, Tensor | None]:
    """One attempt of `compute_basis`, whose arguments these are.

    Returns:
        P and Q with their signs, each None if it is not wanted.

    Raises:
        LinAlgError: The decomposition did not converge.
    """
    rows, cols = grad.shape
    rank = min(rows, cols)
    wide = rows <= cols
    tall = grad.mT if wide else grad
    if method == "svd" and rows == cols:
        p, _, vh = torch.linalg.svd(grad, full_matrices=False)
        q = vh.mT
    else:
        short = _short_side(tall, method)
        if right if wide else left:
            long = _long_side(tall, short)
        elif not wide and method == "svd":  # its partners alone tell its signs
            long = tall @ short
        else:
            long = short
        p, q = (short, long) if wide else (long, short)
    alone = method == "eigh" and not left
    p_signs, q_signs = _signs(q if alone else p), _signs(q)
    q_signs[:rank] = p_signs[:rank]
    return (
        (p * p_signs).contiguous() if left else None,
        (q * q_signs).contiguous() if right else None,
    )


def _short_side(tall: Tensor, method: str) -> Tensor:
    """The right singular vectors of ``[m, n]``, m >= n, largest value first.

    Returns:
        ``[n, n]`` with orthonormal columns; their signs are not settled.

    Raises:
        LinAlgError: ``eigh`` gave vectors that are not finite.
    """
    rows, cols = tall.shape
    if method == "eigh":
        vectors = basis_of_gram(gram_matrix(tall, left=False), tall.dtype)
        if vectors is None:
            raise LinAlgError("eigh did not give finite vectors")
        return vectors
    if 5 * rows >= 6 * cols:  # nearer to a square the QR costs more than it saves
        tall = torch.linalg.qr(tall, mode="r")[1]
    return torch.linalg.svd(tall, full_matrices=False)[2].mT


def _long_side(tall: Tensor, short: Tensor) -> Tensor:
    """The partners of the short side's vectors and a basis of the rest.

    The columns of ``G V`` are orthogonal but for round-off, longest first, so that QR
    takes each one as it is, less its round-off along the longer ones.

    Returns:
        ``[m, m]`` with orthonormal columns, the partners first.
    """
    vectors, r = torch.linalg.qr(tall @ short, mode="complete")
    vectors[:, : short.shape[1]] *= torch.where(r.diagonal() < 0, -1.0, 1.0)
    return vectors
