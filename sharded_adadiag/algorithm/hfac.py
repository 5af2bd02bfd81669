"""H-Fac: both moments factored, in whatever basis (Algorithm 3, steps 4-6).

The rule of arXiv 2406.09958 with ``Gt = P^T G Q`` for G and the corrected decays
h1, h2 of `adafactor`:

    4. u = h1 u + (1 - h1) Gt 1_n / n               row means
       v = h1 v + (1 - h1) Gt^T 1_m / m             column means
    5. r, s, Vhat as in Adafactor
    6. phi = h1 (u 1_n^T - Gt 1_n 1_n^T / n) / sqrt(r 1_n^T / n)
       psi = h1 (1_m v^T - 1_m 1_m^T Gt / m) / sqrt(1_m s^T / m)
       U = (phi + psi) / 2 + clip_d(Gt / sqrt(Vhat))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.adafactor import (
    clip,
    corrected_decay,
    inverse_sqrt_of_factors,
    moving_averages_,
    squared_sums,
)
from sharded_adadiag.algorithm.sums import PartialSum, Sums
from sharded_adadiag.options import Options


def hfac(
    grads: Tensor,
    states: Sequence[dict[str, Tensor]],
    options: Options,
    step: int,
    shape: tuple[int, int],
) -> Sums[Tensor]:
    """Steps 4-6 for a batch of matrices.

    Args:
        grads: Gt of each, ``[k, m, n]`` or blocks of them; overwritten.
        states: ``exp_avg_row`` and ``exp_avg_sq_row`` ``[m]``, ``exp_avg_col`` and
            ``exp_avg_sq_col`` ``[n]`` of each; modified in place.
        options: Its ``betas`` (b1, b2) and ``clip_threshold`` (d) are used.
        step: t, counted from 1.
        shape: ``(m, n)`` of the full matrices.

    Yields:
        Sums over the blocks' entries; the answers are those over the full matrices.

    Returns:
        U of each, in the place of ``grads``.
    """
    m, n = shape
    h1, h2 = (corrected_decay(beta, step) for beta in options.betas)
    sums = [PartialSum(grads.sum(2), "cols"), PartialSum(grads.sum(1), "rows")]
    row_sums, col_sums, row_squares, col_squares = yield sums + squared_sums(grads)
    row_means, col_means = row_sums / n, col_sums / m
    u = torch.stack(moving_averages_(states, "exp_avg_row", row_means, h1))
    v = torch.stack(moving_averages_(states, "exp_avg_col", col_means, h1))

    r = torch.stack(moving_averages_(states, "exp_avg_sq_row", row_squares, h2))
    s = torch.stack(moving_averages_(states, "exp_avg_sq_col", col_squares, h2))
    rsqrt_v = yield from inverse_sqrt_of_factors(r, s)

    phi = h1 * (u - row_means) / (r / n).sqrt()  # [k, m], the same in every column
    psi = h1 * (v - col_means) / (s / m).sqrt()  # [k, n], the same in every row
    update = yield from clip(grads.mul_(rsqrt_v), options.clip_threshold, shape)
    return update.add_(0.5 * phi[:, :, None]).add_(0.5 * psi[:, None, :])
