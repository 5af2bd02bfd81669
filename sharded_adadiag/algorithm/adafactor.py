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

import torch
from torch import Tensor

from sharded_adadiag.algorithm.sums import PartialSum, Sums
from sharded_adadiag.options import Options

# Added to the squared gradient inside the accumulators (Shazeer & Stern's eps1).
ACCUMULATOR_EPS = 1e-30


def adafactor(
    grad: Tensor,
    state: dict[str, Tensor],
    options: Options,
    step: int,
    shape: tuple[int, int],
) -> Sums[Tensor]:
    """Steps 4-6 for one matrix.

    Args:
        grad: Gt, ``[m, n]`` or a block of it.
        state: ``exp_avg_sq_row`` ``[m]``, ``exp_avg_sq_col`` ``[n]`` and, with
            momentum, ``exp_avg`` ``[m, n]``; modified in place.
        options: Its ``betas`` (b1, b2) and ``clip_threshold`` (d) are used.
        step: t, counted from 1.
        shape: ``(m, n)`` of the full matrix.

    Yields:
        Sums over the block's entries; the answers are those over the full matrix.

    Returns:
        U.
    """
    h1, h2 = (corrected_decay(beta, step) for beta in options.betas)
    momentum = grad
    if "exp_avg" in state:
        momentum = moving_average_(state["exp_avg"], grad, h1)

    row_sums, col_sums = yield squared_sums(grad)
    r = moving_average_(state["exp_avg_sq_row"], row_sums, h2)
    s = moving_average_(state["exp_avg_sq_col"], col_sums, h2)
    rsqrt_v = yield from inverse_sqrt_of_factors(r, s)

    return (yield from clip(rsqrt_v.mul_(momentum), options.clip_threshold, shape))


def corrected_decay(beta: float, step: int) -> float:
    """``b (1 - b^(t-1)) / (1 - b^t)``: 0 at the first step.

    Args:
        beta: b, in [0, 1).
        step: t, counted from 1.

    Returns:
        The decay whose moving average from zero is the bias-corrected one.
    """
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)


def moving_average_(moment: Tensor, value: Tensor, decay: float) -> Tensor:
    """``moment = decay * moment + (1 - decay) * value``, in place.

    Args:
        moment: The stored average, of any shape, in its own dtype; modified in place.
        value: The new term, of that shape, in the dtype of the computation.
        decay: Weight of the stored average, in [0, 1].

    Returns:
        The new average in ``value``'s dtype, before it was rounded for storage.
    """
    new = torch.add(moment.to(value.dtype) * decay, value, alpha=1.0 - decay)
    moment.copy_(new)
    return new


def squared_sums(grad: Tensor) -> list[PartialSum]:
    """Row and column sums of ``G^2 + eps``.

    Args:
        grad: ``[m, n]`` or a block of it.

    Returns:
        The sums ``[m]`` over columns, then ``[n]`` over rows.
    """
    square = grad.square().add_(ACCUMULATOR_EPS)
    return [PartialSum(square.sum(1), "cols"), PartialSum(square.sum(0), "rows")]


def inverse_sqrt_of_factors(r: Tensor, s: Tensor) -> Sums[Tensor]:
    """``1 / sqrt(r s^T / (1^T r))``, the scale of step 5.

    Args:
        r: Row statistics ``[m]``.
        s: Column statistics ``[n]``.

    Yields:
        The sum of ``r``.

    Returns:
        ``[m, n]``.
    """
    (total,) = yield [PartialSum(r.sum(), "rows")]
    # Normalised first: r and s alone may be too small for their product.
    rows = (r / total).rsqrt_()
    # Squares that overflow stop a matrix, as they do under Adam: x / inf is 0.
    return torch.outer(rows.where(total.isfinite(), 0.0), s.rsqrt())


def clip(
    update: Tensor, threshold: float | None, shape: tuple[int, int]
) -> Sums[Tensor]:
    """``U / max(1, RMS(U) / d)``, in place; unchanged if ``threshold`` is None.

    Args:
        update: U, ``[m, n]`` or a block of it.
        threshold: d, the largest RMS that is left as it is.
        shape: ``(m, n)`` of the full matrix.

    Yields:
        The sum of squares.

    Returns:
        The clipped update.
    """
    if threshold is None:
        return update
    (total,) = yield [PartialSum(update.square().sum(), "all")]
    rms = (total / math.prod(shape)).sqrt()
    return update.div_((rms / threshold).clamp_(min=1.0))
