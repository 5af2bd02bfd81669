"""The public optimizers in one process, compared with the oracles.

`testing.reference` is the oracle for every option; where others wrote one
(``torch.optim.AdamW``, ``torch.optim.Adafactor``, GaLore) it is asked directly.

Tolerances. All comparisons with `testing.reference` are in float64, to 1e-10 of the
largest entry. Both do the same sums in another order, so they differ by about 1e-16
of the gradient. One place magnifies that: a refresh with empty moments (t = 1), if a
rotated direction has no gradient at all (two sides, or the longer side forced). Its
entries are round-off of 1e-16 |G|, divided by Adam's eps 1e-8, or by 1e-15 in the
factored rules, whose accumulators add 1e-30. With gradients of 1e-3 and 1e-10 both
quotients are 1e-11, and lr = 1e-2 makes 1e-13 of them. The basis of such directions
is arbitrary, but the same decomposition of the same bits gives the same one.
"""

import math

import numpy as np
import pytest
import torch
from test_reference import (
    BETAS,
    SHAPES,
    adafactor_direction,
    average_gram,
    beta_with_corrected_decay,
    differ,
    follow,
    galore_in_our_conventions,
    hfac_direction,
    inverse_root,
    off_diagonal_ratio,
    random_matrices,
    random_orthogonal,
    run_torch,
    zero_fraction,
)

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag
from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal
from sharded_adadiag.testing.reference import ReferenceOptimizer

OPTIMIZERS = {"adadiag": AdaDiag, "adafacdiag": AdafacDiag, "hfacdiag": HfacDiag}
# Two of one shape, which are computed together, and one of each awkward kind.
PARAMETERS = {
    "square": (6, 6),
    "wide": (5, 9),
    "wide twin": (5, 9),
    "tall": (9, 5),
    "convolution": (6, 3, 2, 2),
    "tall convolution": (9, 1, 2, 2),
    "vector": (7,),
    "scalar": (),
    "row": (1, 8),
    "column": (8, 1),
}
STEPS = 12


def close(actual, expected, tolerance, name="weight"):
    """Every difference is below ``tolerance`` times the largest entry expected."""
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected)
    torch.testing.assert_close(
        actual.detach(),
        expected.detach(),
        rtol=0.0,
        atol=tolerance * float(expected.detach().abs().max()),
        msg=lambda message: f"{name}: {message}",
    )


def trainable(tensor):
    return tensor.clone().requires_grad_()


def make_parameters(dtype=torch.float64):
    return {
        name: trainable(random_matrices(1, *shape, scale=0.1, seed=i, dtype=dtype)[0])
        for i, (name, shape) in enumerate(PARAMETERS.items())
    }


def make_gradients(scale, dtype=torch.float64, steps=STEPS):
    return {
        name: random_matrices(steps, *shape, scale=scale, seed=100 + i, dtype=dtype)
        for i, (name, shape) in enumerate(PARAMETERS.items())
    }


def train(optimizer, parameters, gradients):
    for t in range(len(next(iter(gradients.values())))):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][t].clone()
        optimizer.step()


def run(optimizer_class, grads, *, weight=None, **options):
    """One parameter's weight after a step for each gradient, and its state."""
    weight = trainable(torch.zeros_like(grads[0]) if weight is None else weight)
    optimizer = optimizer_class([weight], **options)
    train(optimizer, {"": weight}, {"": grads})
    return weight.detach(), optimizer.state[weight]


# Every option against the reference.

ROTATIONS = {
    "none": {"sides": "none"},
    "one": {"sides": "one"},
    "left": {"sides": "one", "side": "left"},
    "right": {"sides": "one", "side": "right"},
    "two": {"sides": "two"},
}
VARIANTS = {
    "adadiag": [{}, {"noise_floor": 0.05, "maximize": True}],
    "adafacdiag": [
        {},
        {"momentum": False, "clip_threshold": 0.5},
        {"momentum": True, "clip_threshold": None, "noise_floor": 0.05},
        {"momentum": False, "clip_threshold": None, "maximize": True},
    ],
    "hfacdiag": [
        {},
        {"clip_threshold": None, "noise_floor": 0.05},
        {"clip_threshold": 0.5, "maximize": True},
    ],
}
BASES = [
    ("svd", "carry"),
    ("svd", "reproject"),
    ("eigh", "reproject"),
    ("eigh", "carry"),
]


def bases_to_try(rotation, variant):
    """All four with the first variant, then two by turns; one if none is used."""
    if rotation == "none":
        return BASES[:1]
    return BASES[variant % 2 :: 2] if variant else BASES


CASES = [
    pytest.param(
        method,
        {"basis": basis, "on_refresh": on_refresh, **ROTATIONS[rotation], **options},
        id=f"{method}-{rotation}-{basis}-{on_refresh}-{variant}",
    )
    for method in OPTIMIZERS
    for variant, options in enumerate(VARIANTS[method])
    for rotation in ROTATIONS
    for basis, on_refresh in bases_to_try(rotation, variant)
]


def compare_with_reference(method, gradients, tolerance, dtype, options):
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    optimizer = OPTIMIZERS[method](ours.values(), **options)
    reference = ReferenceOptimizer(method, theirs.values(), **options)
    train(optimizer, ours, gradients)
    train(reference, theirs, gradients)
    for name, parameter in ours.items():
        close(parameter, theirs[name], tolerance, name)
        state = optimizer.state[parameter]
        expected = reference.state[theirs[name]]
        assert state.keys() == expected.keys(), name
        assert int(state["step"]) == expected["step"] == len(gradients[name])
        for key in state.keys() - {"step"}:
            label = f"{name}: {key}"
            moment = state[key].reshape(expected[key].shape)
            close(moment, expected[key], tolerance, label)


@pytest.mark.parametrize("method, options", CASES)
def test_every_option_gives_the_weights_and_states_of_the_reference(method, options):
    options = {
        "lr": 1e-2,
        "betas": BETAS,
        "weight_decay": 0.1,
        "refresh_every": 5,
        **options,
    }
    gradients = make_gradients(1e-3 if method == "adadiag" else 1e-10)
    compare_with_reference(method, gradients, 1e-10, torch.float64, options)


@pytest.mark.parametrize("period", [1, 2, None])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_every_period_gives_the_steps_of_the_reference(method, period):
    options = {"lr": 1e-2, "refresh_every": period}
    gradients = make_gradients(1e-2)
    compare_with_reference(method, gradients, 1e-10, torch.float64, options)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_limit_on_the_rotated_dimension_gives_the_steps_of_the_reference(method):
    """6 and 9 are over it: only the wide ones are rotated, left, and the vectors."""
    options = {"lr": 1e-2, "max_rotated_dim": 5, "refresh_every": 5}
    gradients = make_gradients(1e-2)
    compare_with_reference(method, gradients, 1e-10, torch.float64, options)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_in_float32_the_steps_are_those_of_the_reference_to_its_precision(method):
    """One-sided, so no direction is empty; 1e-7 grows with the condition numbers."""
    options = {"lr": 1e-2, "refresh_every": 5, "sides": "one"}
    gradients = make_gradients(1e-2, torch.float32)
    compare_with_reference(method, gradients, 1e-4, torch.float32, options)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_large_matrices_which_are_not_stacked_give_the_steps_of_the_reference(method):
    options = {"lr": 1e-2, "refresh_every": 2}
    grads = random_matrices(4, 160, 224)
    ours, theirs = ([trainable(g) for g in grads[:2]] for _ in range(2))
    optimizer = OPTIMIZERS[method](ours, **options)
    reference = ReferenceOptimizer(method, theirs, **options)
    for grad in grads:
        for p in (*ours, *theirs):
            p.grad = grad + p.detach()
        optimizer.step()
        reference.step()
    for actual, expected in zip(ours, theirs):
        close(actual, expected, 1e-10)


def test_groups_have_their_own_options_and_parameters_may_lack_gradients():
    grads = random_matrices(9, 6, 9)
    ours, theirs = (
        [trainable(torch.zeros(6, 9, dtype=torch.float64)) for _ in range(3)]
        for _ in range(2)
    )

    def groups(a, b, c):
        return [
            {"params": [a]},
            # On two sides what should be zero is round-off, which eps must drown.
            {
                "params": [b],
                "sides": "two",
                "lr": 1e-3,
                "refresh_every": 2,
                "eps": 1e-6,
            },
            {"params": [c], "rotate": False, "weight_decay": 0.1},
        ]

    optimizer = AdaDiag(groups(*ours), lr=1e-2, refresh_every=4)
    reference = ReferenceOptimizer("adadiag", groups(*theirs), lr=1e-2, refresh_every=4)
    for t, grad in enumerate(grads):
        for params in (ours, theirs):
            for i, p in enumerate(params):
                p.grad = None if (t + i) % 3 == 0 else grad.clone()
        optimizer.step()
        reference.step()
        for group in (optimizer.param_groups[0], reference.param_groups[0]):
            group["lr"] *= 0.9  # as a scheduler does
    for i, (actual, expected) in enumerate(zip(ours, theirs)):
        close(actual, expected, 1e-10, f"parameter {i}")


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values())
def test_a_matrix_gets_the_same_bits_alone_and_among_others(optimizer_class, sides):
    options = {"sides": sides, "refresh_every": 5}
    together, gradients = make_parameters(), make_gradients(1e-2)
    train(optimizer_class(together.values(), **options), together, gradients)
    for name, alone in make_parameters().items():
        train(optimizer_class([alone], **options), {name: alone}, gradients)
        assert_equal(alone, together[name], name)


# Oracles that others wrote.


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 3, 2, 2), (7,)])
@pytest.mark.parametrize("name", ["adadiag", "adafacdiag", "hfacdiag"])
def test_without_rotation_the_steps_are_torch_adamw(
    name, shape, maximize, weight_decay
):
    grads = random_matrices(50, *shape, dtype=torch.float32)
    weight = random_matrices(1, *shape, scale=0.1, seed=1, dtype=torch.float32)[0]
    options = {"lr": 1e-3, "weight_decay": weight_decay, "maximize": maximize}
    expected, expected_state = run_torch(torch.optim.AdamW, grads, weight, **options)
    # The factored methods' own base is not Adam; theirs for embeddings is.
    unrotated = {"sides": "none"} if name == "adadiag" else {"rotate": False}
    actual = trainable(weight)
    group = {"params": [actual], **unrotated}
    optimizer = OPTIMIZERS[name]([group], **options)
    train(optimizer, {"": actual}, {"": grads})
    close(actual, expected, 1e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        close(optimizer.state[actual][key], expected_state[key], 1e-6, key)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_adadiag_is_galore_at_full_rank(name, gap, weight_decay):
    grads = random_matrices(30, *SHAPES[name])
    weight = random_matrices(1, *SHAPES[name], scale=0.1, seed=1)[0]
    options = {"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": weight_decay}
    actual, _ = run(
        AdaDiag,
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


@pytest.mark.parametrize("threshold", [None, 1.0])
@pytest.mark.parametrize("momentum", [False, True])
def test_adafacdiag_without_rotation_is_adafactor(momentum, threshold):
    grads = random_matrices(STEPS, 6, 9)
    options = {"betas": BETAS, "momentum": momentum, "clip_threshold": threshold}
    actual, _ = run(AdafacDiag, grads, sides="none", lr=1e-2, **options)
    expected = follow(
        lambda history: adafactor_direction(history, BETAS, threshold, momentum),
        grads,
        lr=1e-2,
    )
    close(actual, expected, 1e-12)


def test_adafacdiag_without_rotation_and_momentum_is_torch_adafactor():
    """As in the test of the reference: a beta of its own on every step."""
    grads = random_matrices(20, 6, 9)
    weight = trainable(random_matrices(1, 6, 9, scale=0.1, seed=1)[0])
    expected, _ = run_torch(
        torch.optim.Adafactor, grads, weight.detach(), lr=1e-5, eps=(1e-30, 1e3)
    )
    optimizer = AdafacDiag([weight], lr=1e-2, sides="none", momentum=False)
    for t, grad in enumerate(grads, start=1):
        beta2 = beta_with_corrected_decay(1 - t**-0.8, t)
        optimizer.param_groups[0]["betas"] = (0.9, beta2)
        weight.grad = grad
        optimizer.step()
    close(weight, expected, 1e-10)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_hfacdiag_without_rotation_is_hfac(threshold):
    grads = random_matrices(STEPS, 6, 9)
    options = {"betas": BETAS, "clip_threshold": threshold}
    actual, _ = run(HfacDiag, grads, sides="none", lr=1e-2, **options)
    expected = follow(lambda h: hfac_direction(h, BETAS, threshold), grads, lr=1e-2)
    close(actual, expected, 1e-12)


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
