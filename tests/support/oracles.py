"""Matrices, runs of the reference, and the oracles that it is tested against."""

import math

import numpy as np
import torch

from sharded_adadiag.testing.reference import reference_step

BETAS = (0.9, 0.99)

SHAPES = {"square": (6, 6), "wide": (6, 9), "tall": (9, 6)}

METHODS = ("adadiag", "adafacdiag", "hfacdiag")


def random_matrices(count, *shape, scale=1e-2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return (scale * gaussian).to(dtype)


def random_orthogonal(size, seed=0):
    return torch.linalg.qr(random_matrices(1, size, size, seed=seed)[0])[0]


def run(method, grads, *, weight=None, state=None, **options):
    """The weight after a step for each gradient, and the state."""
    weight = torch.zeros_like(grads[0]) if weight is None else weight.clone()
    state = {} if state is None else dict(state)
    for grad in grads:
        reference_step(method, weight, grad, state, **options)
    return weight, state


def run_torch(optimizer_class, grads, weight, **options):
    """As `run`, for an optimizer of torch.optim."""
    weight = weight.clone()
    optimizer = optimizer_class([weight], **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight, optimizer.state[weight]


def close(actual, expected, tolerance, name="weights"):
    """Tensors with tensors or arrays, relative to 1 or to the entry if larger."""
    torch.testing.assert_close(
        actual,
        expected if isinstance(expected, torch.Tensor) else torch.tensor(expected),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda message: f"{name}: {message}",
    )


def differ(actual, expected):
    """The greatest difference, relative to the greatest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


# Oracles in NumPy.


class GaLoreAdamW:
    """The official GaLore optimizer (jiaweizzhao/GaLore), retold in float64.

    Added is only the sign rule: LAPACK's signs are arbitrary, and the moments
    carried over a refresh depend on them.
    """

    def __init__(self, *, rank, gap, scale, lr, betas, eps, weight_decay):
        self.rank, self.gap, self.scale = rank, gap, scale
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay = weight_decay
        self.iteration = 0

    def project(self, grad):
        rows, cols = grad.shape
        if self.iteration % self.gap == 0:  # counted before the increment
            u, _, vh = np.linalg.svd(grad, full_matrices=False)
            pivots = u[np.argmax(np.abs(u), axis=0), np.arange(u.shape[1])]
            self.left = (u * np.sign(pivots))[:, : self.rank]
            self.right = (np.sign(pivots)[:, None] * vh)[: self.rank]
        return grad @ self.right.T if rows >= cols else self.left.T @ grad

    def step(self, weight, grad):
        low = self.project(grad)
        if self.iteration == 0:
            self.exp_avg, self.exp_avg_sq = np.zeros_like(low), np.zeros_like(low)
        self.iteration += 1
        beta1, beta2 = self.betas
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * low
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * low**2
        step_size = self.lr * math.sqrt(1 - beta2**self.iteration)
        step_size /= 1 - beta1**self.iteration
        low = self.exp_avg / (np.sqrt(self.exp_avg_sq) + self.eps)
        tall = grad.shape[0] >= grad.shape[1]
        back = low @ self.right if tall else self.left @ low
        weight = weight - step_size * self.scale * back
        return weight - self.lr * self.weight_decay * weight  # of the new weight


def galore_in_our_conventions(grads, weight, *, gap, lr, betas, eps, weight_decay):
    """GaLore at full rank with its three other conventions translated.

    Its eps is added to the uncorrected sqrt(V): eps sqrt(1 - b2^t) there is eps on
    the corrected one. It decays the updated weight, so its update is shrunk too:
    `scale` undoes that.
    """
    galore = GaLoreAdamW(
        rank=min(weight.shape),
        gap=gap,
        scale=1 / (1 - lr * weight_decay),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )
    for t, grad in enumerate(grads, start=1):
        galore.eps = eps * math.sqrt(1 - betas[1] ** t)
        weight = galore.step(weight, grad)
    return weight


def weighted_mean(history, beta):
    """The bias-corrected moving average of all values so far."""
    weights = beta ** np.arange(len(history) - 1, -1, -1.0)
    return np.tensordot(weights, history, axes=1) / weights.sum()


def clip(update, threshold):
    if threshold is None:
        return update
    return update / max(1.0, np.sqrt(np.mean(update**2)) / threshold)


def factored(history, beta2):
    squares = history**2 + 1e-30
    r = weighted_mean(squares.sum(axis=2), beta2)
    s = weighted_mean(squares.sum(axis=1), beta2)
    return r, s, np.outer(r, s) / r.sum()


def adafactor_direction(history, betas, threshold, momentum):
    _, _, vhat = factored(history, betas[1])
    m = weighted_mean(history, betas[0]) if momentum else history[-1]
    return clip(m / np.sqrt(vhat), threshold)


def hfac_direction(history, betas, threshold):
    rows, cols = history[-1].shape
    t = len(history)
    r, s, vhat = factored(history, betas[1])
    decay = betas[0] * (1 - betas[0] ** (t - 1)) / (1 - betas[0] ** t)
    row_means, col_means = history.mean(axis=2), history.mean(axis=1)
    u, v = weighted_mean(row_means, betas[0]), weighted_mean(col_means, betas[0])
    phi = decay * (u - row_means[-1]) / np.sqrt(r / cols)
    psi = decay * (v - col_means[-1]) / np.sqrt(s / rows)
    update = clip(history[-1] / np.sqrt(vhat), threshold)
    return 0.5 * (phi[:, None] + psi) + update


def follow(direction, grads, lr):
    """The weight from zero, given the direction as a function of the history."""
    grads = np.asarray(grads)
    return -lr * sum(direction(grads[: t + 1]) for t in range(len(grads)))


def beta_with_corrected_decay(decay, t):
    """The beta whose corrected decay at step t is the one wanted, by bisection."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(200):
        middle = (low + high) / 2
        corrected = middle * (1 - middle ** (t - 1)) / (1 - middle**t)
        low, high = (middle, high) if corrected < decay else (low, middle)
    return low


ROTATIONS = [
    {"sides": "one"},
    {"sides": "one", "side": "left"},
    {"sides": "one", "side": "right"},
    {"sides": "two"},
]


def rotations(state, shape):
    """P and Q of a state; the identity for a side that is not rotated."""
    eyes = (torch.eye(k, dtype=torch.float64) for k in shape)
    keys = ("rotation_left", "rotation_right")
    return tuple(state.get(key, eye) for key, eye in zip(keys, eyes))


def average_gram(grads, beta):
    """L and R: bias-corrected averages of G G^T and G^T G."""
    grads = grads.numpy()
    left = weighted_mean(grads @ grads.transpose(0, 2, 1), beta)
    return left, weighted_mean(grads.transpose(0, 2, 1) @ grads, beta)


def inverse_root(symmetric):
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors / np.sqrt(values)) @ vectors.T


def off_diagonal_ratio(matrix):
    off = matrix - torch.diag(matrix.diagonal())
    return float(torch.linalg.norm(off) / torch.linalg.norm(matrix))


def zero_fraction(matrix):
    """How many off-diagonal entries of vec(G) vec(G)^T vanish."""
    vec = matrix.T.flatten()
    outer = torch.outer(vec, vec) / vec.square().max()
    off = ~torch.eye(len(vec), dtype=torch.bool)
    return float((outer[off].abs() < 1e-12).double().mean())
