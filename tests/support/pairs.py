"""Fewer cases than a full product, in which still every two values meet."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Collection
from typing import Any

import pytest

FULL_PRODUCTS = os.environ.get("ALL_CASES", "") not in ("", "0")


def parametrize_pairs(**factors: Collection[Any]) -> pytest.MarkDecorator:
    """Cases in which each value of each factor meets each value of each other one.

    ``ALL_CASES=1`` in the environment takes the full product instead.
    """
    product = list(itertools.product(*factors.values()))
    cases = product if FULL_PRODUCTS else cover_pairs(product)
    return pytest.mark.parametrize(
        tuple(factors),
        [pytest.param(*case, id="-".join(map(label, case))) for case in cases],
    )


def label(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return getattr(value, "__name__", str(value))


def cover_pairs(product: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Cases of a product that cover its pairs, few and unlike each other.

    The next one is always the case with most new pairs; among equals, the one whose
    pairs have been seen least.
    """
    seen: collections.Counter[Any] = collections.Counter()
    missing = set().union(*map(pairs_of, product))
    chosen = []

    def worth(case: tuple[Any, ...]) -> tuple[int, int]:
        pairs = pairs_of(case)
        return len(missing & pairs), -sum(seen[pair] for pair in pairs)

    while missing:
        chosen.append(max(product, key=worth))
        missing -= pairs_of(chosen[-1])
        seen.update(pairs_of(chosen[-1]))
    return chosen


def pairs_of(case: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))
