"""The matrix view of a tensor: its first dimension by all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix view of a tensor of ``shape``.

    A convolution weight ``(out, in, kh, kw)`` is the matrix
    ``out x (in * kh * kw)``; a matrix is itself. The inverse is a reshape,
    because the view keeps the order of the elements.

    Args:
        shape: The logical shape of a parameter.

    Returns:
        ``(rows, cols)``; a vector or a scalar is one row.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
