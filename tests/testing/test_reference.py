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
from pathlib import Path

import pytest
import torch
from support.oracles import (
    BETAS,
    SHAPES,
    adafactor_direction,
    beta_with_corrected_decay,
    close,
    follow,
    galore_in_our_conventions,
    hfac_direction,
    random_matrices,
    run,
    run_torch,
)

from sharded_adadiag.testing import reference
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.reference import ReferenceOptimizer, reference_step

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
