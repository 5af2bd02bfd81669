"""What is true of rotated steps in exact arithmetic."""

import math

import numpy as np
import pytest
import torch
from support.one_process import OPTIMIZERS, ROTATIONS, STEPS, close, run, train
from support.oracles import (
    BETAS,
    SHAPES,
    average_gram,
    differ,
    inverse_root,
    off_diagonal_ratio,
    random_matrices,
    random_orthogonal,
    run_torch,
    zero_fraction,
)

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal

# The basis.


def unrotate(state, rotated):
    """P X Q^T with the rotations a state has."""
    if "rotation_left" in state:
        rotated = state["rotation_left"] @ rotated
    if "rotation_right" in state:
        rotated = rotated @ state["rotation_right"].mT
    return rotated


def rotate(state, matrix):
    """P^T X Q with the rotations a state has."""
    transposed = {key: state[key].mT for key in state if key.startswith("rotation")}
    return unrotate(transposed, matrix)


@pytest.mark.parametrize("basis", ["svd", "eigh"])
@pytest.mark.parametrize("name", ["one", "left", "right", "two"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_rotation_is_orthogonal_and_undone_by_its_transpose(shape, name, basis):
    grad = random_matrices(1, *shape)[0]
    _, state = run(AdaDiag, [grad], basis=basis, **ROTATIONS[name])
    keys = [key for key in state if key.startswith("rotation")]
    assert len(keys) == (2 if name == "two" else 1)
    for key in keys:
        assert_orthogonal(state[key], 1e-13, key)
    close(unrotate(state, rotate(state, grad)), grad, 1e-13, "gradient")


@pytest.mark.parametrize("basis", ["svd", "eigh"])
def test_a_float64_parameter_gets_a_float64_basis(basis):
    grad = random_matrices(1, 32, 48)[0]
    _, state = run(AdaDiag, [grad], basis=basis)
    u, _, _ = np.linalg.svd(grad.numpy())
    assert state["rotation_left"].dtype == torch.float64
    assert_orthogonal(state["rotation_left"], 1e-13)
    close(state["rotation_left"].abs(), np.abs(u), 1e-10, "P")


def test_a_float32_parameter_gets_a_float64_basis_on_request_only():
    grad = random_matrices(1, 32, 48, dtype=torch.float32)[0]
    _, single = run(AdaDiag, [grad])
    _, double = run(AdaDiag, [grad], rotation_dtype=torch.float64)
    u, _, _ = np.linalg.svd(grad.double().numpy())
    assert single["rotation_left"].dtype == torch.float32
    assert_orthogonal(single["rotation_left"], 1e-5)
    assert double["rotation_left"].dtype == torch.float64
    close(double["rotation_left"].abs(), np.abs(u), 1e-10, "P")


# What the paper says of the rotated methods.


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_first_two_sided_step_is_the_polar_factor(shape):
    """With eps 1e-10 between the noise (1e-17) and the singular values (1e-2)."""
    grad = random_matrices(1, *shape)[0]
    u, _, vh = np.linalg.svd(grad.numpy(), full_matrices=False)
    weight, _ = run(AdaDiag, [grad], lr=1.0, eps=1e-10, sides="two")
    close(-weight, u @ vh, 1e-5)
    rms = math.sqrt(min(shape) / (shape[0] * shape[1]))
    assert math.isclose(weight.square().mean().sqrt(), rms, rel_tol=1e-6)


def test_the_first_one_sided_step_is_a_rotated_sign():
    grad = random_matrices(1, 6, 9)[0]
    weight, _ = run(AdaDiag, [grad], lr=1.0, eps=1e-13)
    u, _, _ = np.linalg.svd(grad.numpy())
    close(-weight, u @ np.sign(u.T @ grad.numpy()), 1e-8)


@pytest.mark.parametrize(
    "options",
    [{"refresh_every": None}, {"refresh_every": 4, "on_refresh": "reproject"}],
    ids=["one period", "reprojected"],
)
def test_adadiag_is_left_orthogonally_equivariant_and_adam_is_not(options):
    grads, o = random_matrices(STEPS, 6, 9), random_orthogonal(6)
    plain, _ = run(AdaDiag, grads, lr=1e-2, **options)
    turned, _ = run(AdaDiag, o @ grads, lr=1e-2, **options)
    close(turned, o @ plain, 1e-10)
    plain, _ = run(AdaDiag, grads, sides="none")
    turned, _ = run(AdaDiag, o @ grads, sides="none")
    assert differ(turned, o @ plain) > 0.1


@pytest.mark.parametrize("name", ["one", "left", "right", "two"])
def test_a_reprojected_first_moment_is_the_average_of_the_unrotated_gradient(name):
    grads = random_matrices(STEPS, 6, 9)
    options = {"on_refresh": "reproject", "refresh_every": 5, **ROTATIONS[name]}
    _, state = run(AdaDiag, grads, **options)
    _, plain = run_torch(torch.optim.AdamW, grads, grads[0])
    close(unrotate(state, state["exp_avg"]), plain["exp_avg"], 1e-13, "M")
    total = plain["exp_avg_sq"].sum()
    close(state["exp_avg_sq"].sum(), total, 1e-13, "sum of V")


@pytest.mark.parametrize("optimizer_class", [AdafacDiag, HfacDiag])
def test_one_rotation_changes_the_sums_of_its_own_side_only(optimizer_class):
    """I1: r = diag(P^T L P), and s is that of the base method."""
    grads = random_matrices(STEPS, 6, 9)
    _, state = run(optimizer_class, grads, betas=BETAS)
    _, plain = run(optimizer_class, grads, betas=BETAS, sides="none")
    close(state["exp_avg_sq_col"], plain["exp_avg_sq_col"], 1e-13, "s")
    left, _ = average_gram(grads, 0.99)
    p = state["rotation_left"].numpy()
    close(state["exp_avg_sq_row"], np.diag(p.T @ left @ p).copy(), 1e-13, "r")


def test_two_rotations_change_the_sums_of_their_own_sides():
    """I2: r = diag(P^T L P) and s = diag(Q^T R Q)."""
    grads = random_matrices(STEPS, 6, 9)
    _, state = run(AdafacDiag, grads, betas=BETAS, sides="two")
    left, right = average_gram(grads, 0.99)
    p, q = state["rotation_left"].numpy(), state["rotation_right"].numpy()
    close(state["exp_avg_sq_row"], np.diag(p.T @ left @ p).copy(), 1e-13, "r")
    close(state["exp_avg_sq_col"], np.diag(q.T @ right @ q).copy(), 1e-13, "s")


def test_in_the_eigenbases_of_the_averages_adafacdiag_is_shampoo_with_power_one_half():
    """I3, with gradients whose averages keep the first one's singular vectors."""
    grads = random_matrices(4, 6, 6)
    for t in range(1, 4):
        grads[t] = 0.01 * t * random_orthogonal(6, seed=t)
    weight = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    optimizer = AdafacDiag(
        [weight],
        lr=1.0,
        betas=BETAS,
        sides="two",
        refresh_every=None,
        momentum=False,
        clip_threshold=None,
    )
    for t, grad in enumerate(grads):
        before, weight.grad = weight.detach().clone(), grad.clone()
        optimizer.step()
        left, right = average_gram(grads[: t + 1], 0.99)
        shampoo = inverse_root(left) @ grad.numpy() @ inverse_root(right)
        expected = math.sqrt(np.trace(left)) * shampoo
        close(before - weight.detach(), expected, 1e-10, f"step {t + 1}")


def test_on_the_refresh_step_the_rotation_diagonalises():
    """D1: the Gram matrix, and with two sides the gradient itself."""
    grad = random_matrices(1, 6, 9)[0]
    _, one = run(AdaDiag, [grad])
    rotated = rotate(one, grad)
    assert off_diagonal_ratio(rotated @ rotated.mT) < 1e-14
    _, two = run(AdaDiag, [grad], sides="two")
    assert math.isclose(zero_fraction(rotate(two, grad)), 1 - 6 * 5 / (54 * 53))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values())
def test_zero_gradients_after_the_first_step_leave_a_finite_state(
    optimizer_class, rotation, dtype
):
    """The basis of zero is the identity, and without momentum nothing moves."""
    grads = random_matrices(5, 6, 9, dtype=dtype)
    grads[1:] = 0
    options = {"betas": (0.0, 0.9), "refresh_every": 2, **rotation}
    for basis in ("svd", "eigh"):
        first, _ = run(optimizer_class, grads[:1], basis=basis, **options)
        weight, state = run(optimizer_class, grads, basis=basis, **options)
        assert_equal(weight, first)
        assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values())
def test_a_parameter_whose_gradient_is_always_zero_does_not_move(optimizer_class):
    zero, other = (torch.ones(6, 9, requires_grad=True) for _ in range(2))
    gradients = {
        "zero": torch.zeros(4, 6, 9),
        "other": random_matrices(4, 6, 9, dtype=torch.float32),
    }
    optimizer = optimizer_class([zero, other], refresh_every=2)
    train(optimizer, {"zero": zero, "other": other}, gradients)
    assert_equal(zero.detach(), torch.ones(6, 9), "zero")
    assert torch.isfinite(other).all()
    assert (other != 1).any()
