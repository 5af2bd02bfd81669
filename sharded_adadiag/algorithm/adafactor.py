"""The AdaDiag authors' Adafactor, in whatever basis (Algorithm 2, steps 4-6).

With ``Gt = P^T G Q`` and the corrected decays ``h_i = b_i (1 - b_i^(t-1)) /
(1 - b_i^t)``, whose moving average from zero is the bias-corrected one:

    4. M = h1 M + (1 - h1) Gt                       (without momentum: M = Gt)
    5. r = h2 r + (1 - h2) (Gt^2 + eps) 1_n         row sums
       s = h2 s + (1 - h2) (Gt^2 + eps)^T 1_m       column sums
       Vhat = r s^T / (1_m^T r)
    6. U = clip_d(M / sqrt(Vhat)),  clip_d(U) = U / max(1, RMS(U) / d)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.sums import PartialSum, Sums, sums_of_all
from sharded_adadiag.options import Options

# Added to the squared gradient inside the accumulators (Shazeer & Stern's eps1).
ACCUMULATOR_EPS = 1e-30


def adafactor(
    grads: Tensor,
    states: Sequence[dict[str, Tensor]],
    options: Options,
    step: int,
    shape: tuple[int, int],
) -> Sums[Tensor]:
    """Steps 4-6 for a batch of matrices.

    Args:
        grads: Gt of each, ``[k, m, n]`` or blocks of them; overwritten.
        states: ``exp_avg_sq_row`` ``[m]``, ``exp_avg_sq_col`` ``[n]`` and, with
            momentum, ``exp_avg`` ``[m, n]`` of each; modified in place.
        options: Its ``betas`` (b1, b2) and ``clip_threshold`` (d) are used.
        step: t, counted from 1.
        shape: ``(m, n)`` of the full matrices.

    Yields:
        Sums over the blocks' entries; the answers are those over the full matrices.

    Returns:
        U of each, in the place of ``grads``.
    """
    h1, h2 = (corrected_decay(beta, step) for beta in options.betas)
    momentum: Sequence[Tensor] = grads.unbind()
    if "exp_avg" in states[0]:
        momentum = moving_averages_(states, "exp_avg", grads, h1)

    row_sums, col_sums = yield squared_sums(grads)
    r = torch.stack(moving_averages_(states, "exp_avg_sq_row", row_sums, h2))
    s = torch.stack(moving_averages_(states, "exp_avg_sq_col", col_sums, h2))
    rsqrt_v = yield from inverse_sqrt_of_factors(r, s)

    for scale, first, update in zip(
        rsqrt_v.unbind(), momentum, grads.unbind(), strict=True
    ):
        torch.mul(scale, first, out=update)
    return (yield from clip(grads, options.clip_threshold, shape))


def corrected_decay(beta: float, step: int) -> float:
    """``b (1 - b^(t-1)) / (1 - b^t)``: 0 at the first step.

    Args:
        beta: b, in [0, 1).
        step: t, counted from 1.

    Returns:
        The decay whose moving average from zero is the bias-corrected one.
    """
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)


def moving_averages_(
    states: Sequence[dict[str, Tensor]], key: str, values: Tensor, decay: float
) -> list[Tensor]:
    """``moment = decay * moment + (1 - decay) * value`` for each matrix, in place.

    Args:
        states: Where the averages are, of any shape, in their own dtype.
        key: Which of them; modified in place.
        values: The new terms, stacked, in the dtype of the computation.
        decay: Weight of the stored averages, in [0, 1].

    Returns:
        The new averages in the dtype of ``values``, before they were rounded for
        storage: the stored ones themselves where nothing is rounded.
    """
    new = [state[key].to(values.dtype) for state in states]
    torch._foreach_mul_(new, decay)
    torch._foreach_add_(new, values.unbind(), alpha=1.0 - decay)
    for state, value in zip(states, new):
        if state[key] is not value:
            state[key].copy_(value)
    return new


def squared_sums(grads: Tensor) -> list[PartialSum]:
    """Row and column sums of ``G^2 + eps``.

    Args:
        grads: ``[k, m, n]`` or blocks of them.

    Returns:
        The sums ``[k, m]`` over columns, then ``[k, n]`` over rows.
    """
    squares = grads.square().add_(ACCUMULATOR_EPS)
    return [PartialSum(squares.sum(2), "cols"), PartialSum(squares.sum(1), "rows")]


def inverse_sqrt_of_factors(r: Tensor, s: Tensor) -> Sums[Tensor]:
    """``1 / sqrt(r s^T / (1^T r))``, the scale of step 5.

    Args:
        r: Row statistics ``[k, m]``.
        s: Column statistics ``[k, n]``.

    Yields:
        The sums of ``r``.

    Returns:
        ``[k, m, n]``.
    """
    (totals,) = yield [PartialSum(sums_of_all(r), "rows")]
    total = totals[:, None]
    # Normalised first: r and s alone may be too small for their product.
    rows = (r / total).rsqrt_()
    # Squares that overflow stop a matrix, as they do under Adam: x / inf is 0.
    rows = rows.where(total.isfinite(), 0.0)
    return rows[:, :, None] * s.rsqrt()[:, None, :]


def clip(
    update: Tensor, threshold: float | None, shape: tuple[int, int]
) -> Sums[Tensor]:
    """``U / max(1, RMS(U) / d)``, in place; unchanged if ``threshold`` is None.

    Args:
        update: U of each matrix, ``[k, m, n]`` or blocks of them.
        threshold: d, the largest RMS that is left as it is.
        shape: ``(m, n)`` of the full matrices.

    Yields:
        The sums of squares.

    Returns:
        The clipped updates.
    """
    if threshold is None:
        return update
    (total,) = yield [PartialSum(sums_of_all(update.square()), "all")]
    rms = (total / math.prod(shape)).sqrt()
    return update.div_((rms / threshold).clamp_(min=1.0)[:, None, None])
