"""Sums that may span several pieces of a matrix.

A moment rule is written for full matrices, a batch of one shape. Where it needs sums
over rows, columns or all entries it *yields* the sums over what it holds and is sent
those over the whole matrices: the same text then serves full matrices (nothing to add)
and row or column blocks of them (the engine adds the blocks' sums, one collective for
all matrices that wait).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class PartialSum(NamedTuple):
    """Sums over the blocks of matrices that this rank has.

    Attributes:
        value: The sums, of any shape.
        over: What was summed over: ``"rows"``, ``"cols"`` or ``"all"`` entries.
        batch: Position of the batch among those that run together.
    """

    value: Tensor
    over: Literal["rows", "cols", "all"]
    batch: int = 0


Sums = Generator[list[PartialSum], list[Tensor], T]


def together(rules: Sequence[Sums[T]]) -> Sums[list[T]]:
    """Advance several rules in step, one for each batch.

    Args:
        rules: One running rule per batch.

    Yields:
        What all of them wait for, tagged with the position of the rule.

    Returns:
        Their results, in order.
    """
    results: list[T | None] = [None] * len(rules)
    answers: dict[int, list[Tensor] | None] = dict.fromkeys(range(len(rules)))
    while answers:
        waiting: dict[int, list[PartialSum]] = {}
        for i, answer in answers.items():
            try:
                asked = next(rules[i]) if answer is None else rules[i].send(answer)
                waiting[i] = [s._replace(batch=i) for s in asked]
            except StopIteration as stop:
                results[i] = stop.value
        if not waiting:
            break
        totals = iter((yield [s for asked in waiting.values() for s in asked]))
        answers = {i: [next(totals) for _ in asked] for i, asked in waiting.items()}
    return results  # type: ignore[return-value]


def sums_of_all(matrices: Tensor) -> Tensor:
    """The sum of all entries of each matrix.

    Args:
        matrices: ``[k, m, n]``, or ``[k, m]`` for vectors.

    Returns:
        ``[k]``, each with the bits that it has alone: with several threads torch
        divides a lone sum among them, and those of several matrices not.
    """
    return torch.stack([one.sum() for one in matrices.unbind()])


def run(rule: Sums[T], totals: Callable[[list[PartialSum]], list[Tensor]]) -> T:
    """Run a rule to its end.

    Args:
        rule: The running rule.
        totals: Gives the sums over whole matrices for those asked for.

    Returns:
        The rule's result.
    """
    try:
        asked = next(rule)
        while True:
            asked = rule.send(totals(asked))
    except StopIteration as stop:
        return stop.value
