"""Bases against numpy's SVD in float64, for every shape, side and method."""

import math

import numpy as np
import pytest
import torch
from support.pairs import parametrize_pairs

from sharded_adadiag.algorithm.basis import compute_basis
from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal

SHAPES = ((12, 12), (12, 13), (14, 12), (12, 40), (40, 12), (1, 9), (9, 1), (1, 1))
SIDES = ((True, False), (False, True), (True, True))


def gradient(shape, dtype=torch.float64, seed=0):
    """Singular values from 1 down to 1/12, far enough apart to have one basis."""
    rng = np.random.default_rng(seed)
    rows, cols = shape
    rank = min(shape)
    u = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((cols, rank)))[0]
    values = np.arange(rank, 0, -1) / rank
    return torch.from_numpy((u * values) @ v.T).to(dtype)


def signed(vectors, leaders):
    """Columns whose leaders' entries of largest magnitude are positive."""
    rows = np.abs(leaders).argmax(axis=0)
    return vectors * np.sign(leaders[rows, np.arange(leaders.shape[1])])


@parametrize_pairs(
    shape=SHAPES,
    sides=SIDES,
    method=("svd", "eigh"),
    dtype=(torch.float32, torch.float64),
)
def test_bases_are_numpys(shape, sides, method, dtype):
    grad = gradient(shape, dtype)
    left, right = sides
    basis = compute_basis(grad, left=left, right=right, method=method)
    u, _, vh = np.linalg.svd(grad.double().numpy(), full_matrices=False)
    leads = vh.T if method == "eigh" and not left else u
    atol = 100 * torch.finfo(dtype).eps
    for found, want, wanted in (
        (basis.left, signed(u, u), left),
        (basis.right, signed(vh.T, leads), right),
    ):
        assert (found is not None) == wanted
        if found is None:
            continue
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert found.shape == (want.shape[0],) * 2
        assert_orthogonal(found, 30 * torch.finfo(dtype).eps, str(shape))
        np.testing.assert_allclose(found[:, : want.shape[1]], want, rtol=0, atol=atol)
    assert basis.fallback == ""


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (12, 13)])
def test_a_null_space_is_that_of_householder_reflections_of_the_long_side(
    shape, method
):
    """So it does not depend on the library's SVD; each vector obeys the sign rule."""
    basis = compute_basis(gradient(shape), left=True, right=True, method=method)
    assert basis.left is not None
    assert basis.right is not None
    long = (basis.left if shape[0] > shape[1] else basis.right).numpy()
    rest = np.linalg.qr(long[:, : min(shape)], mode="complete")[0][:, min(shape) :]
    np.testing.assert_allclose(long[:, min(shape) :], signed(rest, rest), atol=1e-13)


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (12, 13), (12, 12)])
def test_one_side_has_the_bits_of_the_short_one_of_two(shape, method):
    grad = gradient(shape, torch.float32)
    both = compute_basis(grad, left=True, right=True, method=method)
    rows, cols = shape
    if rows <= cols:
        alone = compute_basis(grad, left=True, right=False, method=method)
        assert_equal(alone.left, both.left, "P")
    else:
        alone = compute_basis(grad, left=False, right=True, method=method)
        # With eigh a lone side follows its own sign, two sides that of the left.
        assert_equal(alone.right.abs(), both.right.abs(), "Q")


@parametrize_pairs(
    shape=((12, 40), (40, 12), (12, 12), (12, 13)),
    sides=SIDES,
    method=("svd", "eigh"),
    exponent=(-120, -30, 60, 127),
)
def test_no_power_of_two_changes_a_bit(shape, sides, method, exponent):
    """Columns of the largest float32 numbers have no finite norm in float32."""
    left, right = sides
    # No entry falls below the normal numbers, where digits would be lost.
    grad = gradient(shape, torch.float32)
    grad = torch.where(grad.abs() < 2.0**-5, 2.0**-5, grad)
    grad = grad / 2.0 ** math.frexp(float(grad.abs().max()))[1]
    want = compute_basis(grad, left=left, right=right, method=method)
    scaled = grad * 2.0**exponent
    got = compute_basis(scaled, left=left, right=right, method=method)
    assert got.fallback == ""
    for a, b in zip(got[:2], want[:2]):
        if b is not None:
            assert_equal(a, b, str(exponent))


def deficient(kind, shape):
    grad = gradient(shape, torch.float32)
    if kind == "rank two":
        return grad[:, :2] @ grad[:2, :]
    if kind == "rows of zeros":
        grad[::2] = 0.0
    elif kind == "columns of zeros":
        grad[:, 1:] = 0.0
    elif kind == "one value":
        return torch.eye(*shape)
    elif kind == "alike":
        grad.fill_(0.25)
    else:
        grad *= 1e-44 / float(grad.abs().max())  # a few denormal numbers
    return grad


@parametrize_pairs(
    kind=(
        *("rank two", "rows of zeros", "columns of zeros"),
        *("one value", "alike", "denormal"),
    ),
    shape=((12, 12), (12, 40), (40, 12), (13, 12), (2, 30), (30, 2)),
    sides=SIDES,
    method=("svd", "eigh"),
)
def test_where_bases_are_many_one_of_them_comes_out(kind, shape, sides, method):
    """Orthonormal, and the rotated gradient is as diagonal as float32 allows."""
    left, right = sides
    grad = deficient(kind, shape)
    basis = compute_basis(grad, left=left, right=right, method=method)
    assert basis.fallback == ""
    p = torch.eye(shape[0]) if basis.left is None else basis.left
    q = torch.eye(shape[1]) if basis.right is None else basis.right
    for name, side in (("P", p), ("Q", q)):
        assert_orthogonal(side, 30 * torch.finfo(torch.float32).eps, name)
    exact = grad.double()
    values = torch.linalg.svdvals(exact)
    rotated = p.double().mT @ exact @ q.double()
    atol = 30 * torch.finfo(torch.float32).eps * float(values[0])
    if left and right:
        want = torch.zeros_like(rotated)
        want.diagonal().copy_(values)
        torch.testing.assert_close(rotated, want, rtol=0.0, atol=atol)
    else:
        gram = rotated @ rotated.mT if left else rotated.mT @ rotated
        want = torch.zeros_like(gram)
        want.diagonal()[: len(values)] = values.square()
        atol *= float(values[0])
        torch.testing.assert_close(gram, want, rtol=0.0, atol=atol)


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_keeps_the_old_basis(bad, method):
    grad = gradient((12, 40), torch.float32)
    grad[3, 5] = bad
    basis = compute_basis(grad, left=True, right=True, method=method)
    assert basis == (None, None, "kept")


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (4, 0)])
def test_nothing_but_zeros_keeps_it_without_a_word(shape, method):
    basis = compute_basis(torch.zeros(shape), left=True, right=True, method=method)
    assert basis == (None, None, "")
