"""Adam's moments in whatever basis the gradient is given (Algorithm 1, steps 4-6).

With ``Gt = P^T G Q``:

    4. M_t = b1 M_{t-1} + (1 - b1) Gt          Mhat = M_t / (1 - b1^t)
    5. V_t = b2 V_{t-1} + (1 - b2) Gt^2        Vhat = V_t / (1 - b2^t)
    6. N_t = Mhat / (sqrt(Vhat) + eps)

These are the moments of ``torch.optim.AdamW``, so its fused kernel computes them.

Private name used, tried with torch 2.13: ``torch._fused_adamw_``, which takes one step
count for all tensors; the public ``adamw`` wants one for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_adadiag.algorithm.sums import Sums
from sharded_adadiag.options import Options


def adam(
    grads: Tensor,
    states: Sequence[dict[str, Tensor]],
    options: Options,
    step: int,
    shape: tuple[int, int],
) -> Sums[Tensor]:
    """Steps 4-6 for a batch of matrices, as a rule that never waits for a sum.

    Args:
        grads: Gt of each, ``[k, m, n]`` or blocks of them; overwritten.
        states: ``exp_avg`` and ``exp_avg_sq`` ``[m, n]`` of each; modified in place.
        options: Its ``betas`` and ``eps`` are used.
        step: t, counted from 1.
        shape: ``(m, n)`` of the full matrices.

    Yields:
        Nothing.

    Returns:
        N_t of each, in the place of ``grads``.
    """
    yield from ()
    adam_(grads.unbind(), states, options, step)
    return grads


def adam_(
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    options: Options,
    step: int,
) -> None:
    """Steps 4-6 for tensors of any shapes; N_t of each is written over its gradient.

    Args:
        grads: Gradients of any shapes, in the basis of the moments.
        states: ``exp_avg`` and ``exp_avg_sq`` of each, modified in place. Without
            ``exp_avg`` the gradient itself stands for the first moment.
        options: Its ``betas`` and ``eps`` are used.
        step: t, counted from 1.
    """
    exp_avgs = [_working(s.get("exp_avg"), g) for s, g in zip(states, grads)]
    exp_avg_sqs = [_working(s["exp_avg_sq"], g) for s, g in zip(states, grads)]
    # A descent step of size minus one that forgets where it began ends at the
    # direction. It begins at the gradient: if that is not finite, nor is the direction.
    now = torch.full((), float(step), device=grads[0].device)
    torch._fused_adamw_(
        list(grads),
        list(grads),
        exp_avgs,
        exp_avg_sqs,
        [],
        [now] * len(grads),
        amsgrad=False,
        beta1=options.betas[0] if "exp_avg" in states[0] else 0.0,
        beta2=options.betas[1],
        lr=-1.0,
        weight_decay=-1.0,
        eps=options.eps,
        maximize=False,
    )
    for state, exp_avg, exp_avg_sq in zip(states, exp_avgs, exp_avg_sqs):
        for key, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if key in state and state[key] is not value:
                state[key].copy_(value)


def _working(moment: Tensor | None, grad: Tensor) -> Tensor:
    """The moment in the dtype of the computation: itself, or a copy."""
    if moment is None:
        return torch.zeros_like(grad)
    # The fused kernel walks through memory; a block of a moment has gaps in it.
    return moment.to(grad.dtype).contiguous()
