"""Assertions of the domain, with messages that say by how much they failed."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Assert that two tensors are the same, bit for bit.

    Shape, dtype and device must agree too. A NaN equals a NaN, and the sign of a
    zero does not count.

    Args:
        actual: The tensor that the code under test gave.
        expected: A tensor of the same shape, dtype and device.
        name: Put before the message, which counts the entries that differ and
            gives the greatest difference.
    """
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0.0,
        atol=0.0,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}",
    )


def assert_orthogonal(q: Tensor, atol: float, name: str = "matrix") -> None:
    """Assert that the columns of a matrix are orthonormal.

    Args:
        q: ``[k, l]`` with ``k >= l``.
        atol: Bound on every entry of ``Q^T Q - I``, which is computed in float64.
        name: Put before the message.

    Raises:
        AssertionError: If an entry is larger, or is not a number.
    """
    q = q.detach().double()
    identity = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    error = float((q.mT @ q - identity).abs().max()) if q.numel() else 0.0
    if not error <= atol:  # also true of NaN
        raise AssertionError(
            f"{name}: columns are not orthonormal, the largest entry of "
            f"|Q^T Q - I| is {error:.3g}, allowed is {atol:.3g}"
        )
