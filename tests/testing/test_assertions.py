"""The assertions say what differs, and by how much."""

import math

import pytest
import torch
from support.oracles import random_orthogonal

from sharded_adadiag.testing.assertions import assert_equal, assert_orthogonal


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
