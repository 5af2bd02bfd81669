"""Every two values meet in the cases that stand for a full product."""

import itertools

import pytest
from support.pairs import cover_pairs, pairs_of


@pytest.mark.parametrize("sizes,most", [((3, 2, 2, 7, 2), 21), ((3, 6, 2, 2), 18)])
def test_every_pair_is_covered_by_few_cases(sizes, most):
    product = list(itertools.product(*map(range, sizes)))
    cases = cover_pairs(product)
    assert set(cases) <= set(product)
    for (i, first), (j, second) in itertools.combinations(enumerate(sizes), 2):
        met = {(case[i], case[j]) for case in cases}
        assert met == set(itertools.product(range(first), range(second)))
    assert len(cases) == len(set(cases)) == most


def test_a_product_of_two_factors_is_taken_whole():
    product = list(itertools.product("abc", "de"))
    assert cover_pairs(product) == product
    assert pairs_of(("a", "d")) == {((0, "a"), (1, "d"))}
