"""The oracle itself, tested against what others wrote and against the paper's claims.

The oracles of the oracle are ``torch.optim.AdamW``, ``torch.optim.Adafactor``, and
NumPy formulas in float64 that are written another way: moving averages are weighted
means over the whole history, and GaLore is GaLore's official code retold.

Scales are chosen with care. On a refresh step most entries of a two-sided rotation
P^T G Q are zero in exact arithmetic and about 1e-16 |G| in float64; a rule that
divides by the square root of its second moment would blow them up to +-1 unless
its eps dominates. Gradients of 1e-2 keep them eight orders below Adam's eps 1e-8.
"""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sharded_adadiag.testing import reference
from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal
from sharded_adadiag.testing.reference import ReferenceOptimizer, reference_step

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


# The base methods (E1, E2, C1).


def grads_that_rotate_nothing(rows, cols, count):
    """The first one is diagonal, so its singular vectors are the unit vectors."""
    grads = random_matrices(count, rows, cols)
    grads[0] = torch.zeros(rows, cols)
    grads[0].diagonal().copy_(1e-2 * torch.arange(min(rows, cols), 0, -1))
    return grads


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7,)])
def test_without_rotation_adadiag_is_torch_adamw(shape, dtype, tolerance, maximize):
    grads = random_matrices(50, *shape, dtype=dtype)
    weight = random_matrices(1, *shape, scale=0.1, seed=1, dtype=dtype)[0]
    options = {
        "lr": 1e-3,
        "betas": BETAS,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "maximize": maximize,
    }
    expected, _ = run_torch(torch.optim.AdamW, grads, weight, **options)
    actual, _ = run("adadiag", grads, weight=weight, sides="none", **options)
    close(actual, expected, tolerance)


@pytest.mark.parametrize("shape, sides", [((6, 6), "two"), ((6, 9), "one")])
def test_a_rotation_by_the_identity_leaves_torch_adamw(shape, sides):
    grads = grads_that_rotate_nothing(*shape, 50)
    options = {"lr": 1e-3, "betas": BETAS, "weight_decay": 0.1}
    weight = random_matrices(1, *shape, scale=0.1, seed=1)[0]
    actual, state = run(
        "adadiag", grads, weight=weight, sides=sides, refresh_every=None, **options
    )
    for key in {"rotation_left", "rotation_right"} & state.keys():
        assert_equal(state[key], torch.eye(6, dtype=torch.float64), key)
    expected, _ = run_torch(torch.optim.AdamW, grads, weight, **options)
    close(actual, expected, 1e-12)


@pytest.mark.parametrize("method", ["adafacdiag", "hfacdiag"])
@pytest.mark.parametrize("options", [{"rotate": False}, {"max_rotated_dim": 5}])
def test_a_matrix_that_may_not_be_rotated_gets_torch_adamw(method, options):
    grads = random_matrices(10, 6, 9)
    actual, state = run(method, grads, betas=BETAS, lr=1e-3, **options)
    weight = torch.zeros(6, 9, dtype=torch.float64)
    expected, _ = run_torch(
        torch.optim.AdamW, grads, weight, betas=BETAS, lr=1e-3, weight_decay=0.0
    )
    close(actual, expected, 1e-12)
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_without_momentum_a_vector_gets_adamw_with_beta1_zero():
    grads = random_matrices(10, 7)
    actual, state = run("adafacdiag", grads, betas=BETAS, lr=1e-3, momentum=False)
    weight = torch.zeros(7, dtype=torch.float64)
    expected, _ = run_torch(
        torch.optim.AdamW, grads, weight, betas=(0.0, 0.99), lr=1e-3, weight_decay=0.0
    )
    close(actual, expected, 1e-12)
    assert state.keys() == {"step", "exp_avg_sq"}


# The base method itself, and rotated by the identity.
UNROTATED = {
    "none": ({"sides": "none"}, random_matrices(12, 6, 9)),
    "identity": ({"refresh_every": None}, grads_that_rotate_nothing(6, 9, 12)),
}


@pytest.mark.parametrize("sides, grads", UNROTATED.values(), ids=UNROTATED)
@pytest.mark.parametrize("threshold", [None, 1.0, 0.5])
@pytest.mark.parametrize("momentum", [False, True])
def test_adafacdiag_without_rotation_is_adafactor(momentum, threshold, sides, grads):
    options = {"lr": 1e-2, "betas": BETAS, "momentum": momentum, **sides}
    actual, _ = run("adafacdiag", grads, clip_threshold=threshold, **options)
    expected = follow(
        lambda history: adafactor_direction(history, BETAS, threshold, momentum),
        grads,
        lr=1e-2,
    )
    close(actual, expected, 1e-12)


@pytest.mark.parametrize("method", ["adadiag", "hfacdiag"])
def test_only_adafacdiag_can_do_without_momentum(method):
    grads = random_matrices(3, 6, 9)
    same, _ = run(method, grads, momentum=False)
    assert_equal(same, run(method, grads)[0])


@pytest.mark.parametrize("sides, grads", UNROTATED.values(), ids=UNROTATED)
@pytest.mark.parametrize("threshold", [None, 1.0, 0.5])
def test_hfacdiag_without_rotation_is_hfac(threshold, sides, grads):
    options = {"lr": 1e-2, "betas": BETAS, "clip_threshold": threshold, **sides}
    actual, _ = run("hfacdiag", grads, **options)
    expected = follow(lambda h: hfac_direction(h, BETAS, threshold), grads, lr=1e-2)
    close(actual, expected, 1e-12)


def beta_with_corrected_decay(decay, t):
    """The beta whose corrected decay at step t is the one wanted, by bisection."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(200):
        middle = (low + high) / 2
        corrected = middle * (1 - middle ** (t - 1)) / (1 - middle**t)
        low, high = (middle, high) if corrected < decay else (low, middle)
    return low


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adafacdiag_without_rotation_and_momentum_is_torch_adafactor(shape):
    """Its decay 1 - t^-0.8 is a beta of its own on every step.

    Its step size max(eps2, RMS(W)) min(lr, 1/sqrt(t)) is 1e3 * 1e-5 here.
    """
    grads = random_matrices(20, *shape)
    weight = random_matrices(1, *shape, scale=0.1, seed=1)[0]
    expected, _ = run_torch(
        torch.optim.Adafactor,
        grads,
        weight,
        lr=1e-5,
        eps=(1e-30, 1e3),
        weight_decay=100.0,
    )
    actual, state = weight.clone(), {}
    for t, grad in enumerate(grads, start=1):
        beta2 = beta_with_corrected_decay(1 - t**-0.8, t)
        reference_step(
            "adafacdiag",
            actual,
            grad,
            state,
            lr=1e-2,
            betas=(0.9, beta2),
            weight_decay=0.1,
            sides="none",
            momentum=False,
        )
    close(actual, expected, 1e-10)


def test_a_corrected_decay_is_a_bias_corrected_average():
    grads = random_matrices(30, 6, 9)
    _, ours = run("adafacdiag", grads, sides="none", betas=BETAS)
    _, theirs = run_torch(torch.optim.AdamW, grads, grads[0], betas=BETAS)
    close(ours["exp_avg"], theirs["exp_avg"] / (1 - 0.9**30), 1e-12)
    row_sums = theirs["exp_avg_sq"].sum(1) / (1 - 0.99**30)
    close(ours["exp_avg_sq_row"], row_sums, 1e-12)


# GaLore (E7).


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gap", [1, 7, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_adadiag_is_galore_at_full_rank(name, gap, weight_decay):
    grads = random_matrices(30, *SHAPES[name])
    weight = random_matrices(1, *SHAPES[name], scale=0.1, seed=1)[0]
    options = {"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": weight_decay}
    actual, _ = run(
        "adadiag",
        grads,
        weight=weight,
        refresh_every=gap,
        side="right" if name == "square" else "auto",  # GaLore's squares go right
        **options,
    )
    expected = galore_in_our_conventions(
        grads.numpy(), weight.numpy(), gap=gap, **options
    )
    close(actual, expected, 1e-10)


# The basis: reconstruction (E3), signs, refreshes.

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


@pytest.mark.parametrize("basis", ["svd", "eigh"])
@pytest.mark.parametrize("options", ROTATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_rotation_is_orthogonal_and_undone_by_its_transpose(shape, options, basis):
    grad = random_matrices(1, *shape)[0]
    _, state = run("adadiag", [grad], basis=basis, **options)
    p, q = rotations(state, shape)
    assert_orthogonal(p, 1e-13, "P")
    assert_orthogonal(q, 1e-13, "Q")
    close(p @ (p.mT @ grad @ q) @ q.mT, grad, 1e-15, "gradient")


def largest_entries(vectors):
    return vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]


@pytest.mark.parametrize("basis", ["svd", "eigh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_left_vectors_have_a_positive_largest_entry_and_partners_follow(shape, basis):
    grad = random_matrices(1, *shape, seed=3)[0]
    _, state = run("adadiag", [grad], basis=basis, sides="two")
    p, q = state["rotation_left"], state["rotation_right"]
    assert (largest_entries(p) > 0).all()
    singular_values = np.linalg.svd(grad.numpy(), compute_uv=False)
    close((p.mT @ grad @ q).diagonal(), singular_values, 1e-13, "P^T G Q")
    assert (largest_entries(q[:, min(shape) :]) > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_right_basis_alone_has_the_signs_of_its_method(seed):
    """The SVD's vectors follow the left ones; eigenvectors have none to follow."""
    grad = random_matrices(1, 9, 6, seed=seed)[0]
    _, by_svd = run("adadiag", [grad], basis="svd")
    _, by_eigh = run("adadiag", [grad], basis="eigh")
    left = grad @ by_svd["rotation_right"]  # U S
    assert (largest_entries(left) > 0).all()
    assert (largest_entries(by_eigh["rotation_right"]) > 0).all()
    close(by_svd["rotation_right"].abs(), by_eigh["rotation_right"].abs(), 1e-9)


@pytest.mark.parametrize("options", [{"side": "left"}, {"sides": "two"}])
def test_both_bases_make_the_same_steps(options):
    grads = random_matrices(12, 6, 6)
    options = {"refresh_every": 5, "lr": 1e-2, **options}
    by_svd, _ = run("adadiag", grads, basis="svd", **options)
    by_eigh, _ = run("adadiag", grads, basis="eigh", **options)
    close(by_eigh, by_svd, 1e-6)


def test_one_side_is_the_shorter_one_and_left_if_square():
    for shape, key in [((6, 6), "left"), ((6, 9), "left"), ((9, 6), "right")]:
        _, state = run("adadiag", random_matrices(1, *shape))
        assert state.keys() & {"rotation_left", "rotation_right"} == {f"rotation_{key}"}
        assert state[f"rotation_{key}"].shape == (6, 6)


@pytest.mark.parametrize("period, expected", [(5, [1, 6, 11]), (1, None), (None, [1])])
def test_the_basis_is_refreshed_on_steps_1_and_t_plus_1(period, expected):
    state, refreshed = {}, []
    weight = torch.zeros(6, 9, dtype=torch.float64)
    for t, grad in enumerate(random_matrices(12, 6, 9), start=1):
        old = state.get("rotation_left")
        reference_step("adadiag", weight, grad, state, refresh_every=period)
        if old is None or not torch.equal(old, state["rotation_left"]):
            refreshed.append(t)
            u, _, _ = np.linalg.svd(grad.numpy())  # of the current gradient
            close(state["rotation_left"].abs(), np.abs(u), 1e-12, "P")
    assert refreshed == (expected or list(range(1, 13)))


@pytest.mark.parametrize("options", ROTATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_is_its_matrix_view(method, options):
    grads = random_matrices(12, 6, 3, 2, 2, scale=1e-9)
    options = {"refresh_every": 5, **options}
    as_tensor, _ = run(method, grads, **options)
    as_matrix, _ = run(method, grads.reshape(12, 6, 12), **options)
    assert_equal(as_tensor.reshape(6, 12), as_matrix)


# The update: norms (E4), first step (C2, E9), hazard (C3), zero gradient (C6).


@pytest.mark.parametrize("options", ROTATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rotating_back_keeps_the_norm_of_the_update(shape, options):
    grads = random_matrices(9, *shape)
    before, _ = run("adadiag", grads[:8], lr=1.0, betas=BETAS, **options)
    after, state = run("adadiag", grads, lr=1.0, betas=BETAS, **options)
    m, v = state["exp_avg"] / (1 - 0.9**9), state["exp_avg_sq"] / (1 - 0.99**9)
    norm = torch.linalg.norm(m / (v.sqrt() + 1e-8))
    close(torch.linalg.norm(after - before), norm, 1e-12, "norm")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_first_two_sided_step_is_the_polar_factor(shape):
    """With eps 1e-10 between the noise (1e-17) and the singular values (1e-2)."""
    grad = random_matrices(1, *shape)[0]
    u, _, vh = np.linalg.svd(grad.numpy(), full_matrices=False)
    weight, _ = run("adadiag", [grad], lr=1.0, eps=1e-10, sides="two")
    close(-weight, u @ vh, 1e-6)
    rms = math.sqrt(min(shape) / (shape[0] * shape[1]))
    assert math.isclose(weight.square().mean().sqrt(), rms, rel_tol=1e-6)


def test_the_first_one_sided_step_is_a_rotated_sign():
    grad = random_matrices(1, 6, 9)[0]
    weight, _ = run("adadiag", [grad], lr=1.0, eps=1e-13)
    u, _, _ = np.linalg.svd(grad.numpy())
    close(-weight, u @ np.sign(u.T @ grad.numpy()), 1e-8)
    assert math.isclose(weight.square().mean().sqrt(), 1.0, rel_tol=1e-8)


def test_a_noise_floor_removes_the_amplified_round_off_of_the_first_step():
    grad = random_matrices(1, 64, 96, scale=1.0, dtype=torch.float32)[0]
    u, _, vh = np.linalg.svd(grad.numpy(), full_matrices=False)
    polar = torch.from_numpy(u @ vh)
    noisy, _ = run("adadiag", [grad], lr=1.0, sides="two")
    clean, _ = run("adadiag", [grad], lr=1.0, sides="two", noise_floor=1e-5)
    assert torch.linalg.norm(-noisy - polar) > torch.linalg.norm(polar)
    assert torch.linalg.norm(-clean - polar) < 1e-3 * torch.linalg.norm(polar)


def test_a_noise_floor_drops_small_entries_of_the_rotated_gradient_only():
    grads = random_matrices(2, 6, 9)
    _, state = run("adadiag", grads, betas=(0.0, 0.0), noise_floor=0.05)
    rotated = state["rotation_left"].mT @ grads[1]
    kept = rotated.abs() >= 0.05 * grads[1].square().sum().sqrt()
    assert 0 < kept.sum() < kept.numel()
    close(state["exp_avg"], torch.where(kept, rotated, 0.0), 1e-15, "rotated")
    base, _ = run("adafacdiag", grads, sides="none", noise_floor=0.05)
    same, _ = run("adafacdiag", grads, sides="none")
    assert_equal(base, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"sides": "none"}, *ROTATIONS])
@pytest.mark.parametrize("method", METHODS)
def test_zero_gradients_move_nothing_and_leave_a_finite_state(method, options, dtype):
    weight = torch.ones(6, 9, dtype=dtype)
    grads = torch.zeros(3, 6, 9, dtype=dtype)
    for basis in ("svd", "eigh"):
        after, state = run(
            method, grads, weight=weight, refresh_every=2, basis=basis, **options
        )
        assert_equal(after, weight)
        assert all(torch.isfinite(torch.as_tensor(x)).all() for x in state.values())


def test_maximize_ascends():
    grads = random_matrices(7, 6, 9)
    options = {"refresh_every": 3, "sides": "one"}
    up, _ = run("adadiag", grads, maximize=True, **options)
    down, _ = run("adadiag", -grads, **options)
    assert_equal(up, down)


# What the basis's free choices change and what they do not (C4, C5/E8).


def signs_and_order(size, seed=5):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0
    assert signs.min() < signs.max()
    return signs.double(), torch.randperm(size, generator=generator)


def run_in_given_bases(method, grads, bases, **options):
    """A period for each basis; the moments are carried, the rotation is replaced."""
    weight = torch.zeros_like(grads[0])
    state = {"step": 1}  # not a refresh step any more
    for period, basis in zip(grads.split(len(grads) // len(bases)), bases):
        state.update(basis)
        weight, state = run(
            method, period, weight=weight, state=state, refresh_every=None, **options
        )
    return weight


INVARIANT = [
    ("adadiag", {"sides": "one"}),
    ("adadiag", {"sides": "two"}),
    ("adafacdiag", {"sides": "one", "momentum": True}),
    ("adafacdiag", {"sides": "two", "momentum": False}),
]


@pytest.mark.parametrize("method, options", INVARIANT)
def test_within_a_period_signs_and_order_of_the_basis_do_not_matter(method, options):
    grads = random_matrices(8, 6, 9)
    p, q = random_orthogonal(6), random_orthogonal(9)
    (row_signs, rows), (col_signs, cols) = signs_and_order(6), signs_and_order(9)
    basis = {"rotation_left": p, "rotation_right": q}
    other = {
        "rotation_left": (p * row_signs)[:, rows],
        "rotation_right": (q * col_signs)[:, cols],
    }
    if options["sides"] == "one":
        del basis["rotation_right"], other["rotation_right"]
    expected = run_in_given_bases(method, grads, [basis], **options)
    actual = run_in_given_bases(method, grads, [other], **options)
    close(actual, expected, 1e-12)


def test_hfacdiag_depends_on_the_signs_of_the_basis_but_not_on_its_order():
    """A flipped row of P^T G changes the column means: hence the sign rule."""
    grads = random_matrices(10, 6, 9)
    p, (signs, order) = random_orthogonal(6), signs_and_order(6)
    runs = {
        name: run_in_given_bases("hfacdiag", grads, [{"rotation_left": basis}])
        for name, basis in [("p", p), ("flipped", p * signs), ("moved", p[:, order])]
    }
    close(runs["moved"], runs["p"], 1e-12)
    assert differ(runs["flipped"], runs["p"]) > 0.01


def test_across_a_refresh_only_a_carried_first_moment_sees_the_signs():
    grads = random_matrices(8, 6, 9)
    first, second = random_orthogonal(6), random_orthogonal(6, seed=2)
    flipped = second * signs_and_order(6)[0]

    def effect_of_signs(method, **options):
        plain, other = (
            run_in_given_bases(
                method,
                grads,
                [{"rotation_left": first}, {"rotation_left": last}],
                **options,
            )
            for last in (second, flipped)
        )
        return differ(other, plain)

    assert effect_of_signs("adadiag") > 0.01
    assert effect_of_signs("adafacdiag", momentum=True) > 0.01
    assert effect_of_signs("adafacdiag", momentum=False) < 1e-12


@pytest.mark.parametrize(
    "options",
    [{"refresh_every": None}, {"refresh_every": 4, "on_refresh": "reproject"}],
    ids=["one period", "reprojected"],
)
def test_adadiag_is_left_orthogonally_equivariant_and_adam_is_not(options):
    """G -> O G maps W to O W; across a refresh only if the moments follow.

    A carried first moment would see the sign rule, which O does not respect.
    """
    grads, o = random_matrices(12, 6, 9), random_orthogonal(6)
    plain, _ = run("adadiag", grads, lr=1e-2, **options)
    turned, _ = run("adadiag", o @ grads, lr=1e-2, **options)
    close(turned, o @ plain, 1e-11)
    plain, _ = run("adadiag", grads, sides="none")
    turned, _ = run("adadiag", o @ grads, sides="none")
    assert differ(turned, o @ plain) > 0.1


def test_two_sided_adadiag_is_equivariant_on_both_sides_of_a_square():
    grads = random_matrices(12, 6, 6)
    left, right = random_orthogonal(6), random_orthogonal(6, seed=1)
    options = {"sides": "two", "refresh_every": None, "lr": 1e-2}
    plain, _ = run("adadiag", grads, **options)
    turned, _ = run("adadiag", left @ grads @ right, **options)
    close(turned, left @ plain @ right, 1e-8)


# Re-expressed moments.


@pytest.mark.parametrize("options", ROTATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_reprojected_first_moment_is_the_average_of_the_unrotated_gradient(
    shape, options
):
    grads = random_matrices(12, *shape)
    options = {"on_refresh": "reproject", "refresh_every": 5, **options}
    _, state = run("adadiag", grads, betas=BETAS, **options)
    _, plain = run_torch(torch.optim.AdamW, grads, grads[0], betas=BETAS)
    p, q = rotations(state, shape)
    close(p @ state["exp_avg"] @ q.mT, plain["exp_avg"], 1e-15, "M")
    # The squared entries of a change of basis are doubly stochastic.
    close(state["exp_avg_sq"].sum(), plain["exp_avg_sq"].sum(), 1e-15, "sum of V")


@pytest.mark.parametrize("side, key", [("left", "row"), ("right", "col")])
def test_reprojected_factors_of_the_rotated_side_keep_what_they_mean(side, key):
    grads = random_matrices(12, 6, 6)
    options = {"on_refresh": "reproject", "refresh_every": 5, "betas": BETAS}
    _, state = run("hfacdiag", grads, side=side, **options)
    _, plain = run("hfacdiag", grads, sides="none", **options)
    basis = state[f"rotation_{side}"]
    means, sums = f"exp_avg_{key}", f"exp_avg_sq_{key}"
    close(basis @ state[means], plain[means], 1e-15, means)
    close(state[sums].sum(), plain[sums].sum(), 1e-15, sums)
    # Nothing can be said of the other side's means; its squares do not change (I1).
    other = {"row": "exp_avg_sq_col", "col": "exp_avg_sq_row"}[key]
    close(state[other], plain[other], 1e-15, other)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_refresh_that_only_reorders_the_basis_changes_nothing_if_reprojected(
    method, side
):
    """The singular values change places in a 3-cycle, which is not its own inverse.

    By eigh, so that each vector keeps its sign whatever its partner does.
    """
    u, grads = random_orthogonal(3, seed=9), []
    for t in range(6):
        spectrum = 1e-2 * torch.tensor([3.0, 2.0, 1.0]).double().roll(t)
        grads.append((u * spectrum) @ random_orthogonal(5, seed=t)[:3])
    grads = torch.stack(grads if side == "left" else [g.mT for g in grads])
    options = {"lr": 1e-2, "basis": "eigh", "side": side, "on_refresh": "reproject"}
    often, last = run(method, grads, refresh_every=1, **options)
    never, first = run(method, grads, refresh_every=None, **options)
    order = [2, 0, 1]  # after five cycles
    rotation = f"rotation_{side}"
    close(last[rotation], first[rotation][:, order], 1e-12, rotation)
    close(often, never, 1e-12)


def test_a_carried_moment_is_not_touched_by_a_refresh():
    grads = random_matrices(6, 6, 9)
    _, before = run("adadiag", grads[:5], betas=BETAS, refresh_every=5)
    _, after = run("adadiag", grads, betas=BETAS, refresh_every=5)
    rotated = after["rotation_left"].mT @ grads[5]
    close(after["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * rotated, 1e-15, "M")


# Identities of the factored rules (I1-I3, E6).


def average_gram(grads, beta):
    """L and R: bias-corrected averages of G G^T and G^T G."""
    grads = grads.numpy()
    left = weighted_mean(grads @ grads.transpose(0, 2, 1), beta)
    return left, weighted_mean(grads.transpose(0, 2, 1) @ grads, beta)


@pytest.mark.parametrize("method", ["adafacdiag", "hfacdiag"])
def test_one_rotation_changes_the_sums_of_its_own_side_only(method):
    """I1: r = diag(P^T L P) + n eps, and s is that of the base method."""
    grads = random_matrices(12, 6, 9)
    _, state = run(method, grads, betas=BETAS)
    _, plain = run(method, grads, betas=BETAS, sides="none")
    close(state["exp_avg_sq_col"], plain["exp_avg_sq_col"], 1e-15, "s")
    left, _ = average_gram(grads, 0.99)
    p = state["rotation_left"].numpy()
    close(state["exp_avg_sq_row"], np.diag(p.T @ left @ p), 1e-15, "r")
    assert differ(state["exp_avg_sq_row"], plain["exp_avg_sq_row"]) > 0.01


def test_two_rotations_change_the_sums_of_their_own_sides():
    """I2: r = diag(P^T L P) and s = diag(Q^T R Q)."""
    grads = random_matrices(12, 6, 9)
    _, state = run("adafacdiag", grads, betas=BETAS, sides="two")
    left, right = average_gram(grads, 0.99)
    p, q = state["rotation_left"].numpy(), state["rotation_right"].numpy()
    close(state["exp_avg_sq_row"], np.diag(p.T @ left @ p), 1e-15, "r")
    close(state["exp_avg_sq_col"], np.diag(q.T @ right @ q), 1e-15, "s")


def inverse_root(symmetric):
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors / np.sqrt(values)) @ vectors.T


def test_in_the_eigenbases_of_the_averages_adafacdiag_is_shampoo_with_power_one_half():
    """I3: U = tr(L)^(1/2) L^(-1/2) G R^(-1/2), the SOAP paper's equivalence.

    The gradients after the first are multiples of orthogonal matrices: their Gram
    matrices are multiples of the identity, so the first one's singular vectors stay
    the eigenvectors of L and R while the gradient is dense in that basis.
    """
    grads = random_matrices(6, 6, 6)
    for t in range(1, 6):
        grads[t] = 0.01 * t * random_orthogonal(6, seed=t)
    options = {
        "sides": "two",
        "refresh_every": None,
        "momentum": False,
        "clip_threshold": None,
        "betas": BETAS,
        "lr": 1.0,
    }
    before = torch.zeros_like(grads[0])
    for t in range(1, 7):
        after, _ = run("adafacdiag", grads[:t], **options)
        left, right = average_gram(grads[:t], 0.99)
        shampoo = inverse_root(left) @ grads[t - 1].numpy() @ inverse_root(right)
        close(before - after, math.sqrt(np.trace(left)) * shampoo, 1e-10, f"step {t}")
        before = after


# What the rotation diagonalises (D1-D4).


def off_diagonal_ratio(matrix):
    off = matrix - torch.diag(matrix.diagonal())
    return float(torch.linalg.norm(off) / torch.linalg.norm(matrix))


def zero_fraction(matrix):
    """How many off-diagonal entries of vec(G) vec(G)^T vanish."""
    vec = matrix.T.flatten()
    outer = torch.outer(vec, vec) / vec.square().max()
    off = ~torch.eye(len(vec), dtype=torch.bool)
    return float((outer[off].abs() < 1e-12).double().mean())


def test_on_the_refresh_step_the_gram_matrix_is_diagonal():
    grad = random_matrices(1, 6, 9)[0]
    _, state = run("adadiag", [grad])
    rotated = state["rotation_left"].mT @ grad
    assert off_diagonal_ratio(grad @ grad.mT) > 0.3
    assert off_diagonal_ratio(rotated @ rotated.mT) < 1e-14


def test_on_the_refresh_step_two_sides_leave_the_singular_values():
    """D1: r (r - 1) of the off-diagonal entries of the covariance do not vanish."""
    grad = random_matrices(1, 6, 9)[0]
    _, state = run("adadiag", [grad], sides="two")
    rotated = state["rotation_left"].mT @ grad @ state["rotation_right"]
    sigma = torch.zeros(6, 9, dtype=torch.float64)
    sigma.diagonal().copy_(
        torch.from_numpy(np.linalg.svd(grad.numpy(), compute_uv=False))
    )
    close(rotated, sigma, 1e-15, "P^T G Q")
    assert zero_fraction(grad) == 0.0
    assert math.isclose(zero_fraction(rotated), 1 - 6 * 5 / (54 * 53))


def low_rank_gradient(rank):
    return (random_matrices(1, 6, rank) @ random_matrices(1, rank, 9, seed=1))[0]


def test_rows_of_the_rotated_gradient_have_the_singular_values_for_norms():
    """D2: so the trailing rows of a rank-deficient gradient vanish."""
    for grad, rank in [(random_matrices(1, 6, 9)[0], 6), (low_rank_gradient(2), 2)]:
        _, state = run("adadiag", [grad])
        norms = torch.linalg.norm(state["rotation_left"].mT @ grad, dim=1)
        singular_values = np.linalg.svd(grad.numpy(), compute_uv=False)
        close(norms / norms[0], singular_values / singular_values[0], 1e-14, "norms")
        assert (norms > 1e-12 * norms[0]).sum() == rank


def test_between_refreshes_the_covariance_is_closer_to_diagonal_not_diagonal():
    """D3: stationary gradients A Z_t with a spectrum, in the basis of the first."""
    spectrum = 0.7 ** torch.arange(16, dtype=torch.float64)
    a = random_orthogonal(16) * spectrum
    grads = a @ random_matrices(50, 16, 32, seed=1)
    _, state = run("adadiag", grads, refresh_every=None)
    rotated = state["rotation_left"].mT @ grads[1:]
    for average in (lambda x: x[-1] @ x[-1].mT, lambda x: (x @ x.mT).mean(0)):
        before = off_diagonal_ratio(average(grads[1:]))
        after = off_diagonal_ratio(average(rotated))
        assert before > 0.7
        assert 0.01 < after < 0.5 * before


def test_the_truncated_basis_of_galore_shows_no_such_sparsity():
    """D4: only with all the vectors do the empty directions become zeros."""
    grad = low_rank_gradient(2)
    options = {"gap": 1, "scale": 1, "lr": 1, "betas": BETAS, "eps": 0}
    fractions = {
        rank: zero_fraction(
            torch.from_numpy(
                GaLoreAdamW(rank=rank, weight_decay=0, **options).project(grad.numpy())
            )
        )
        for rank in (1, 2, 6)
    }
    assert fractions[1] == fractions[2] == 0.0
    assert math.isclose(fractions[6], 1 - 18 * 17 / (54 * 53))
    _, state = run("adadiag", [grad], sides="two")
    rotated = state["rotation_left"].mT @ grad @ state["rotation_right"]
    assert math.isclose(zero_fraction(rotated), 1 - 2 * 1 / (54 * 53))


# The Hamiltonian (E10).


@pytest.mark.parametrize("b, decreases", [(1.0, True), (4.0, True), (16.0, False)])
def test_the_hamiltonian_decreases_if_b_is_at_most_4a(b, decreases):
    """H = f(W) + <M, M / (sqrt(V) + eps)> / (2a), for any path of rotations.

    A step of AdaDiag with lr = dt, b1 = 1 - a dt and b2 = 1 - b dt is a forward
    Euler step of the paper's ODE once the bias corrections have died out.
    """
    a, dt, eps = 1.0, 1e-3, 1e-3
    left, target = random_matrices(1, 8, 4, scale=1.0)[0], random_matrices(1, 8, 5)[0]
    weight = random_matrices(1, 4, 5, scale=1.0, seed=1)[0].requires_grad_()
    state, energies = {"step": 10**9}, []
    for k in range(1500):
        if k % 150 == 0:
            state["rotation_left"] = random_orthogonal(4, seed=k)
        loss = torch.log1p((left @ weight - 100 * target).square()).sum()
        (grad,) = torch.autograd.grad(loss, weight)
        if k > 0:
            m, v = state["exp_avg"], state["exp_avg_sq"]
            kinetic = (m * m / (v.sqrt() + eps)).sum() / (2 * a)
            energies.append(loss.item() + kinetic.item())
        betas = (1 - a * dt, 1 - b * dt)
        reference_step(
            "adadiag",
            weight,
            grad,
            state,
            lr=dt,
            betas=betas,
            eps=eps,
            refresh_every=None,
        )
    increases = (np.diff(energies) > 0).sum()
    assert increases == 0 if decreases else increases > 100
    assert energies[-1] < energies[0] - 1.0


# The optimizer around it, and the assertions.


def test_the_optimizer_steps_every_parameter_with_the_options_of_its_group():
    a, b, c = (torch.zeros(6, 9, dtype=torch.float64) for _ in range(3))
    optimizer = ReferenceOptimizer(
        "adadiag",
        [{"params": [a, b]}, {"params": [c], "sides": "none", "lr": 0.1}],
        refresh_every=2,
    )
    grads = random_matrices(5, 6, 9)
    for t, grad in enumerate(grads):
        a.grad, b.grad, c.grad = grad, grad if t % 2 else None, grad
        optimizer.step()
    assert_equal(a, run("adadiag", grads, refresh_every=2)[0], "a")
    assert_equal(b, run("adadiag", grads[1::2], refresh_every=2)[0], "b, skipped")
    assert_equal(c, run("adadiag", grads, sides="none", lr=0.1)[0], "c")
    assert optimizer.state[b]["step"] == 2


def test_the_reference_imports_nothing_of_ours():
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(a.name for a in node.names)]
        if name
    }
    assert not any("sharded_adadiag" in name for name in imported)
    assert all(getattr(n, "level", 0) == 0 for n in ast.walk(tree))


def test_assert_equal_names_what_differs_and_by_how_much():
    x = torch.tensor([1.0, 2.0, math.nan])
    assert_equal(x, x.clone())
    with pytest.raises(AssertionError, match=r"(?s)moment: .*difference: 0\.5"):
        assert_equal(x, torch.tensor([1.0, 2.5, math.nan]), "moment")
    with pytest.raises(AssertionError, match="dtype"):
        assert_equal(x, x.double())


def test_assert_orthogonal_says_how_far_the_columns_are_from_it():
    q = random_orthogonal(5)
    assert_orthogonal(q[:, :3], 1e-14)
    assert_orthogonal(torch.empty(0, 0), 1e-14)
    with pytest.raises(AssertionError, match="P: .* is 0.01, allowed is 1e-06"):
        assert_orthogonal(q * math.sqrt(1.01), 1e-6, "P")
    with pytest.raises(AssertionError, match="nan"):
        assert_orthogonal(q * math.nan, 1e-6)
