"""What a change of basis may change in the reference's steps, and what it may not."""

import pytest
import torch
from support.oracles import (
    BETAS,
    METHODS,
    ROTATIONS,
    SHAPES,
    close,
    differ,
    random_matrices,
    random_orthogonal,
    rotations,
    run,
    run_torch,
)

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
