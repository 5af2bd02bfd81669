"""The three optimizers, one matrix at a time: the first file to read.

Slow and plain: full matrices, no ranks, Algorithms 1-3 of "Improving Adaptive Moment
Optimization via Preconditioner Diagonalization" (arXiv 2502.07488) in order. It imports
nothing of this package, because it is the oracle for the rest. In the comments W is the
weight [m, n], G its gradient, G~ the rotated gradient, t the step counted from 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceOptions:
    """The options that change the numbers, named as in the public optimizers."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    sides: str = "one"  # or "none" (the base method), "two" (AdaDiag++)
    side: str = "auto"  # or "left", "right"
    refresh_every: int | None = 200  # T; None keeps the first basis for ever
    refresh_slots: int = 1  # K
    slot: int = 0  # of this matrix, as `ReferenceOptimizer` gives them
    refresh_lag: int = 0  # L
    on_refresh: str = "carry"  # or "reproject"
    basis: str = "svd"  # or "eigh"
    basis_from: str = "gradient"  # or "momentum", "gram"
    gram_beta: float = 0.95
    first_moment: str = "rotated"  # or "original"
    max_rotated_dim: int = 8192
    noise_floor: float = 0.0
    maximize: bool = False
    rotate: bool = True
    momentum: bool = True  # AdafacDiag only
    clip_threshold: float | None = 1.0  # d; AdafacDiag and HfacDiag only


@torch.no_grad()
def reference_step(
    method: str, weight: Tensor, grad: Tensor, state: dict[str, Any], **options: Any
) -> None:
    """One step for one parameter: W = W - lr (P N Q^T + weight_decay W).

    Args:
        method: ``"adadiag"``, ``"adafacdiag"`` or ``"hfacdiag"``.
        weight: W, of any shape, float32 or float64; modified in place.
        grad: G, of the same shape.
        state: Empty before the first step; modified in place.
        **options: Fields of `ReferenceOptions`.
    """
    o = ReferenceOptions(**options)
    o = o if method == "adafacdiag" else dataclasses.replace(o, momentum=True)
    t = state["step"] = state.get("step", 0) + 1
    grad = -grad if o.maximize else grad
    weight.mul_(1 - o.lr * o.weight_decay)  # decoupled, as in torch.optim.AdamW
    sides = _rotated_sides(weight, o)
    if sides is None:
        weight.sub_(o.lr * _adam(grad, state, t, o))
        return
    g = grad.reshape(weight.shape[0], -1)  # 1. G_t, a convolution's as [m, rest]

    # 2. The basis of the current gradient on steps 1, T+1, 2T+1, ..., or so much later
    # as the slot says; in force from then on, or L steps later if it is not the first.
    # On request of averages that the gradient has been added to. Zeros tell nothing of
    # a basis: the old one stays, and the first comes when there are more.
    p = state.get("rotation_left", torch.eye(g.shape[0]).to(g))
    q = state.get("rotation_right", torch.eye(g.shape[1]).to(g))
    has_basis = state.keys() & {"rotation_left", "rotation_right"}
    made = {"gradient": g}
    if o.basis_from == "gram":
        made = _gram_averages(g, state, *sides, o)
    elif o.basis_from == "momentum":
        made = {"gradient": _momentum(g, state, p, q, o.betas[0], t, method)}
    new = {}
    if _is_due(t - 1, o) or not has_basis:
        new = _new_basis(made, *sides, o.basis, g.dtype)
    if o.refresh_lag and has_basis:
        coming = state.setdefault("coming", {})
        if _is_due(t - 1, o):
            coming[t + o.refresh_lag] = new
        new = coming.pop(t, {})
    if new:
        if o.on_refresh == "reproject":
            _reproject(state, new, p, q, (1, 2))
        elif o.first_moment == "original":
            _reproject(state, new, p, q, (1,))
        state.update(new)
        p, q = new.get("rotation_left", p), new.get("rotation_right", q)

    # 3. G~ = P^T G Q
    rotated = p.mT @ g @ q
    floor = o.noise_floor if any(sides) else 0.0
    rotated[rotated.abs() < floor * torch.linalg.norm(g)] = 0.0
    # 4-6. N, the base method's update in the rotated basis.
    rule = {"adadiag": _adam, "adafacdiag": _adafactor, "hfacdiag": _hfac}[method]
    n = rule(rotated, state, t, o)
    # 7. W = W - lr P N Q^T
    weight.sub_(o.lr * (p @ n @ q.mT).reshape(weight.shape))


class ReferenceOptimizer:
    """`reference_step` for parameters or param groups, as in ``torch.optim``."""

    def __init__(self, method: str, params: Iterable[Any], **options: Any) -> None:
        self.method, self.state = method, dict[Tensor, dict[str, Any]]()
        groups = list(params)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        self.param_groups = [{**options, **group} for group in groups]
        self.slots = _slots(self.param_groups)

    def step(self) -> None:
        """Update every parameter that has a ``grad``."""
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state.setdefault(p, {})
                    options["slot"] = self.slots[p]
                    reference_step(self.method, p, p.grad, state, **options)


def _is_due(since_first: int, o: ReferenceOptions) -> bool:
    """Whether a matrix has its turn, the first step aside."""
    if o.refresh_every is None:
        return False
    phase = o.slot * o.refresh_every // o.refresh_slots
    return since_first % o.refresh_every == phase


def _slots(groups: list[dict[str, Any]]) -> dict[Tensor, int]:
    # One by one, those that take longest first, to the slot with least so far.
    slots, loads, weighed = {}, dict[tuple[int, int], int](), list[Any]()
    for group in groups:
        options = {key: group[key] for key in group if key != "params"}
        o = ReferenceOptions(**options)
        for p in group["params"]:
            left, right = _rotated_sides(p, o) or (False, False)
            weighed.append((-_slot_weight(p, left, right), o.refresh_slots, p))
    for weight, count, p in sorted(weighed, key=lambda one: one[0]):
        slots[p] = min(range(count), key=lambda s: loads.get((count, s), 0))
        loads[count, slots[p]] = loads.get((count, slots[p]), 0) - weight
    return slots


def _slot_weight(weight: Tensor, left: bool, right: bool) -> int:
    """Multiply-adds of a decomposition, roughly; it shall never change."""
    if not (left or right):
        return 0
    rows, cols = weight.flatten(1).shape
    short, long = sorted((rows, cols))
    null_space = short * long**2 if max(rows * left, cols * right) > short else 0
    return short**2 * (16 * short + long) + null_space


def _rotated_sides(weight: Tensor, o: ReferenceOptions) -> tuple[bool, bool] | None:
    """Whether to rotate left and right; None for plain, unfactored Adam."""
    if weight.dim() < 2 or weight.numel() == 0 or not o.rotate:
        return None
    rows, cols = weight.flatten(1).shape
    one = o.side if o.side != "auto" else "left" if rows <= cols else "right"
    which = {"none": "none", "one": one, "two": "left and right"}[o.sides]
    left, right = "left" in which, "right" in which
    longest = max(rows * left, cols * right)
    return (left, right) if longest <= o.max_rotated_dim else None


def _new_basis(
    made: dict[str, Tensor], left: bool, right: bool, basis: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """P and Q of the gradient, the momentum or Gram averages; none of zeros."""
    if not any(x.any() for x in made.values()):
        return {}
    if "gradient" in made:
        return _basis(made["gradient"], left, right, basis)
    return {f"rotation_{side}": _vectors(x).to(dtype) for side, x in made.items()}


def _basis(g: Tensor, left: bool, right: bool, basis: str) -> dict[str, Tensor]:
    """P and Q: the singular vectors of G, or eigenvectors of its Gram matrices."""
    rank = min(g.shape)
    if basis == "svd":
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        p, q = _completed(u), _completed(vh.mT)
        # Either sign of a pair (u, v) is a solution. The largest entry of u is made
        # positive and v follows; a v without a partner obeys the rule itself.
        q_signs = torch.cat([_signs(p)[:rank], _signs(q)[rank:]])
        p, q = p * _signs(p), q * q_signs
    else:
        grams = g.double() @ g.double().mT, g.double().mT @ g.double()
        p, q = (torch.linalg.eigh(gram).eigenvectors.flip(1) for gram in grams)
        p, q = _completed(p[:, :rank]), _completed(q[:, :rank])
        p, q = (p * _signs(p)).to(g.dtype), (q * _signs(q)).to(g.dtype)
        if left and right:  # partners have a non-negative "singular value"
            q[:, :rank] *= torch.where((p.mT @ g @ q).diagonal() < 0, -1, 1)
    bases = {"rotation_left": p} if left else {}
    return bases | ({"rotation_right": q} if right else {})


def _completed(vectors: Tensor) -> Tensor:
    """To a square: of all bases of the rest, that of Householder's reflections."""
    rest = torch.linalg.qr(vectors, mode="complete").Q[:, vectors.shape[1] :]
    return torch.cat([vectors, rest], dim=1)


def _signs(vectors: Tensor) -> Tensor:
    """The sign of each column's entry of largest magnitude."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1, 1).to(vectors.dtype)


def _gram_averages(
    g: Tensor, state: dict[str, Any], left: bool, right: bool, o: ReferenceOptions
) -> dict[str, Tensor]:
    """L = b L + (1 - b) G G^T and R = b R + (1 - b) G^T G, of the rotated sides."""
    g = g.double()  # in float32 the squares of small directions are lost
    grams = {"left": g @ g.mT} if left else {}
    grams |= {"right": g.mT @ g} if right else {}
    return {s: _average(state, f"gram_{s}", x, o.gram_beta) for s, x in grams.items()}


def _momentum(
    g: Tensor,
    state: dict[str, Any],
    p: Tensor,
    q: Tensor,
    beta: float,
    t: int,
    method: str,
) -> Tensor:
    """The first moment in the original frame, this step's gradient in it."""
    decay = beta if method == "adadiag" else _decay(beta, t)
    old = p @ state.get("exp_avg", torch.zeros_like(g)) @ q.mT
    return decay * old + (1 - decay) * g


def _vectors(gram: Tensor) -> Tensor:
    """Eigenvectors, the largest eigenvalue first."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return vectors * _signs(vectors)


def _reproject(
    state: dict[str, Any],
    new: dict[str, Tensor],
    p: Tensor,
    q: Tensor,
    powers: tuple[int, ...],
) -> None:
    """Re-express the moments; the sums of a side that is not rotated stay."""
    for power, moment in zip(powers, ("exp_avg", "exp_avg_sq")):
        if "rotation_left" in new:  # M <- R M, V <- (R o R) V
            r = new["rotation_left"].mT @ p
            for key in state.keys() & {moment, f"{moment}_row"}:
                state[key] = r**power @ state[key]
        if "rotation_right" in new:  # M <- M S, V <- V (S o S)
            s = q.mT @ new["rotation_right"]
            for key in state.keys() & {moment, f"{moment}_col"}:
                state[key] = state[key] @ s**power


def _average(state: dict[str, Any], key: str, x: Tensor, decay: float) -> Tensor:
    """``decay * old + (1 - decay) * x``, from zero."""
    state[key] = decay * state.get(key, torch.zeros_like(x)) + (1 - decay) * x
    return state[key]


def _adam(g: Tensor, state: dict[str, Any], t: int, o: ReferenceOptions) -> Tensor:
    """N = Mhat / (sqrt(Vhat) + eps), as ``torch.optim.AdamW``."""
    b1, b2 = o.betas
    m = _average(state, "exp_avg", g, b1) / (1 - b1**t) if o.momentum else g
    v = _average(state, "exp_avg_sq", g**2, b2) / (1 - b2**t)
    return m / (v.sqrt() + o.eps)


def _adafactor(g: Tensor, state: dict[str, Any], t: int, o: ReferenceOptions) -> Tensor:
    """N = clip_d(M / sqrt(Vhat)), the authors' Adafactor."""
    m = _average(state, "exp_avg", g, _decay(o.betas[0], t)) if o.momentum else g
    return _clip(m / _factored(g, state, t, o).sqrt(), o.clip_threshold)


def _hfac(g: Tensor, state: dict[str, Any], t: int, o: ReferenceOptions) -> Tensor:
    """N = (phi + psi) / 2 + clip_d(G~ / sqrt(Vhat)), H-Fac (arXiv 2406.09958)."""
    bh1 = _decay(o.betas[0], t)
    u = _average(state, "exp_avg_row", g.mean(1), bh1)
    v = _average(state, "exp_avg_col", g.mean(0), bh1)
    normalised = _clip(g / _factored(g, state, t, o).sqrt(), o.clip_threshold)
    phi = bh1 * (u - g.mean(1)) / (state["exp_avg_sq_row"] / g.shape[1]).sqrt()
    psi = bh1 * (v - g.mean(0)) / (state["exp_avg_sq_col"] / g.shape[0]).sqrt()
    return 0.5 * (phi[:, None] + psi[None, :]) + normalised


def _factored(g: Tensor, state: dict[str, Any], t: int, o: ReferenceOptions) -> Tensor:
    """Vhat = r s^T / (1^T r), with r and s averages of row and column sums."""
    square, bh2 = g**2 + 1e-30, _decay(o.betas[1], t)
    r = _average(state, "exp_avg_sq_row", square.sum(1), bh2)
    s = _average(state, "exp_avg_sq_col", square.sum(0), bh2)
    return torch.outer(r / r.sum(), s)  # r s^T first would underflow in float32


def _decay(beta: float, t: int) -> float:
    """The corrected decay: its average from zero needs no bias correction."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def _clip(u: Tensor, d: float | None) -> Tensor:
    """clip_d(U) = U / max(1, RMS(U) / d); None switches it off."""
    return u / max(1.0, float(u.square().mean().sqrt()) / (d or float("inf")))
