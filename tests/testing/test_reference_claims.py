"""The paper's claims hold for the reference: sums, diagonals, the Hamiltonian."""

import math

import numpy as np
import pytest
import torch
from support.oracles import (
    BETAS,
    GaLoreAdamW,
    average_gram,
    close,
    differ,
    inverse_root,
    off_diagonal_ratio,
    random_matrices,
    random_orthogonal,
    run,
    zero_fraction,
)

from sharded_adadiag.testing.reference import reference_step


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
