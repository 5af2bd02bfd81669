"""The rotation: an orthonormal basis that diagonalises the gradient's covariance.

Step 2 of Algorithms 1-3 of the paper: ``U, S, V^T = SVD(G)``, ``P = U`` and, for
two sides, ``Q = V``. ``eigh`` of the float64 Gram matrix gives the same spaces
with more accurate small directions and never needs the other side.

The sign of a singular pair is arbitrary. It is fixed here, so that no result
depends on LAPACK or cuSOLVER: the entry of largest magnitude of each left vector
is positive and its partner follows; a vector without a partner obeys the rule
itself.
"""

from __future__ import annotations

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
    if not bool(grad.any()):
        return Basis(None, None)
    # LAPACK may return garbage for Inf without an error, so both the input and
    # the result are tested instead of relying on exceptions.
    if bool(torch.isfinite(grad).all()):
        for attempt in ("svd", "eigh") if method == "svd" else ("eigh",):
            decompose = _svd_basis if attempt == "svd" else _eigh_basis
            try:
                basis = decompose(grad, left, right)
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


def _signs(vectors: Tensor) -> Tensor:
    """+1 or -1 per column, that makes its entry of largest magnitude positive."""
    if vectors.numel() == 0:
        return vectors.new_ones(vectors.shape[1])
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _svd_basis(
    grad: Tensor, left: bool, right: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows, cols = grad.shape
    rank = min(rows, cols)
    # The thin factors are square on the short side: the long side's null space
    # is computed only where it is asked for.
    full = (left and rows > cols) or (right and cols > rows)
    u, _, vh = torch.linalg.svd(grad, full_matrices=full)
    u_signs, v_signs = _signs(u), _signs(vh.mT)
    v_signs[:rank] = u_signs[:rank]
    return (
        (u * u_signs).contiguous() if left else None,
        (vh.mT * v_signs).contiguous() if right else None,
    )


def _eigh_basis(
    grad: Tensor, left: bool, right: bool
) -> tuple[Tensor | None, Tensor | None]:
    failed = LinAlgError("eigh did not give finite vectors")
    p = q = None
    if left:
        p = basis_of_gram(gram_matrix(grad, left=True), grad.dtype)
        if p is None:
            raise failed
    if right:
        q = basis_of_gram(gram_matrix(grad, left=False), grad.dtype)
        if q is None:
            raise failed
    if p is not None and q is not None:
        rank = min(grad.shape)
        pairs = torch.sum((p.mT @ grad)[:rank] * q.mT[:rank], dim=1)
        q[:, :rank] *= torch.where(pairs < 0, -1.0, 1.0).to(q.dtype)
    return p, q
