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

import pytest
import torch
from support.one_process import (
    OPTIMIZERS,
    PARAMETERS,
    ROTATIONS,
    close,
    make_gradients,
    make_parameters,
    train,
    trainable,
)
from support.oracles import BETAS, random_matrices

from sharded_adadiag import AdaDiag
from sharded_adadiag.testing.assertions import assert_equal
from sharded_adadiag.testing.reference import ReferenceOptimizer

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


def compare_with_reference(
    method, gradients, tolerance, dtype, options, names=tuple(PARAMETERS)
):
    ours, theirs = (
        {name: p for name, p in make_parameters(dtype).items() if name in names}
        for _ in range(2)
    )
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


# What a basis is made of, how it is computed, and what becomes of the moments.
MADE_OF = [
    ("gram", "svd", "rotated", "carry"),
    ("gram", "eigh", "original", "carry"),
    ("gram", "svd", "rotated", "reproject"),
    ("momentum", "svd", "rotated", "carry"),
    ("momentum", "eigh", "original", "carry"),
    ("momentum", "svd", "rotated", "reproject"),
    ("gradient", "svd", "original", "carry"),
    ("gradient", "eigh", "original", "reproject"),
]


@pytest.mark.parametrize("made_of", MADE_OF, ids="-".join)
@pytest.mark.parametrize("rotation", [*ROTATIONS][1:])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_bases_made_of_more_give_the_steps_of_the_reference(method, rotation, made_of):
    if method == "hfacdiag" and made_of[0] == "momentum":
        made_of = ("gram", *made_of[1:])
    names = "basis_from", "basis", "first_moment", "on_refresh"
    options = {"lr": 1e-2, "betas": BETAS, "weight_decay": 0.1, "refresh_every": 3}
    options |= dict(zip(names, made_of)) | {"gram_beta": 0.8} | ROTATIONS[rotation]
    # The first gradient tells nothing of some directions of the long side: which basis
    # these get depends on the last bits of an average, so those matrices are left out.
    whole = {
        "one": lambda rows, cols: True,
        "left": lambda rows, cols: rows <= cols,
        "right": lambda rows, cols: rows >= cols,
        "two": lambda rows, cols: rows == cols,
    }[rotation]
    names = [
        name
        for name, shape in PARAMETERS.items()
        if len(shape) < 2 or whole(shape[0], math.prod(shape[1:]))
    ]
    gradients = make_gradients(1e-3 if method == "adadiag" else 1e-10)
    compare_with_reference(method, gradients, 1e-10, torch.float64, options, names)


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
