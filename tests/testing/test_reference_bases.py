"""The reference's basis: orthogonal, with fixed signs, refreshed on time."""

import math

import numpy as np
import pytest
import torch
from support.oracles import (
    BETAS,
    METHODS,
    ROTATIONS,
    SHAPES,
    close,
    random_matrices,
    rotations,
    run,
)

from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal
from sharded_adadiag.testing.reference import reference_step


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
