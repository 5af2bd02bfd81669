"""Optimizers of others, as the benchmarks run them beside ours.

A peer whose package is missing is named so in the tables. pytorch_optimizer and
heavyball are on PyPI; Dion (github.com/microsoft/dion) and the SOAP of its authors
(github.com/nikhilvyas/SOAP, one file) are clones on the PYTHONPATH.

Newton-Schulz products are in bfloat16 where their authors have them so. On a CPU
without bfloat16 units that is several times slower than float32, which would flatter
us, so each of these optimizers is there with float32 products as well, and named so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

LR = 1e-4
FLOAT32 = ", float32 products"
Params = list[torch.nn.Parameter]


class WithoutBfloat16:
    """An optimizer whose code finds float32 where it asks for bfloat16."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state

    def step(self) -> None:
        with mock.patch.object(Tensor, "bfloat16", Tensor.float):
            self.optimizer.step()


def orthogonalized(matrices: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Newton-Schulz in float32 with the coefficients of Muon's authors.

    Args:
        matrices: ``[..., m, n]``.
        epsilon: Added to the norms.

    Returns:
        The same shape.
    """
    x = matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def adamw(params: Params, every: int, **how: bool) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **how)


def muon(params: Params, every: int) -> Optimizer:
    return torch.optim.Muon(params, lr=LR, weight_decay=0.0)


def conda(params: Params, every: int) -> Optimizer:
    from pytorch_optimizer import Conda

    return Conda(params, lr=LR, update_proj_gap=every)


def soap(params: Params, every: int) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=LR, weight_decay=0.0, precondition_frequency=every)


def authors_soap(params: Params, every: int) -> Optimizer:
    from soap import SOAP

    return SOAP(params, lr=LR, weight_decay=0.0, precondition_frequency=every)


def heavyball_soap(params: Params, every: int) -> Optimizer:
    import heavyball

    heavyball.utils.compile_mode = None
    return heavyball.SOAP(
        params,
        lr=LR,
        weight_decay=0.0,
        precondition_frequency=every,
        max_precond_dim=10_000,
        merge_dims=False,
        use_precond_schedule=False,
    )


def dion_muon(params: Params, every: int) -> Optimizer:
    from dion import Muon

    return Muon(params, lr=LR, weight_decay=0.0, newton_schulz_func=orthogonalized)


def dion2(params: Params, every: int) -> Optimizer:
    from dion import Dion2

    return Dion2(params, lr=LR, weight_decay=0.0, newton_schulz_func=orthogonalized)


PEERS: dict[str, Callable[[Params, int], Any]] = {
    "torch AdamW, foreach": lambda params, every: adamw(params, every, foreach=True),
    "torch AdamW, fused": lambda params, every: adamw(params, every, fused=True),
    "torch Muon": muon,
    "torch Muon" + FLOAT32: lambda params, every: WithoutBfloat16(muon(params, every)),
    "Dion's Muon" + FLOAT32: dion_muon,
    "Dion2" + FLOAT32: dion2,
    "pytorch_optimizer Conda": conda,
    "pytorch_optimizer SOAP": soap,
    "HeavyBall SOAP": heavyball_soap,
    "nikhilvyas SOAP": authors_soap,
}
