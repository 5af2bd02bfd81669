"""Sums that may span several pieces of a matrix.

A moment rule is written for a full matrix. Where it needs a sum over rows,
columns or all entries it *yields* the sum over what it holds and is sent the sum
over the whole matrix: the same text then serves a full matrix (nothing to add)
and a row or column block of one (the engine adds the blocks' sums, one collective
for all matrices that wait).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from sharded_adadiag.options import Options

T = TypeVar("T")


class PartialSum(NamedTuple):
    """A sum over the block of a matrix that this rank has.

    Attributes:
        value: The sum, of any shape.
        over: What was summed over: ``"rows"``, ``"cols"`` or ``"all"`` entries.
        matrix: Position of the matrix in its batch.
    """

    value: Tensor
    over: Literal["rows", "cols", "all"]
    matrix: int = 0


Sums = Generator[list[PartialSum], list[Tensor], T]


def together(rules: Sequence[Sums[T]]) -> Sums[list[T]]:
    """Advance several rules in step, one for each matrix.

    Args:
        rules: One running rule per matrix.

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
                waiting[i] = [s._replace(matrix=i) for s in asked]
            except StopIteration as stop:
                results[i] = stop.value
        if not waiting:
            break
        totals = iter((yield [s for asked in waiting.values() for s in asked]))
        answers = {i: [next(totals) for _ in asked] for i, asked in waiting.items()}
    return results  # type: ignore[return-value]


def each(rule: Callable[..., Sums[T]]) -> Callable[..., Sums[list[T]]]:
    """Make a rule for one matrix a rule for a batch of matrices of one shape.

    Args:
        rule: Takes the gradient, state, options, step and shape of one matrix.

    Returns:
        The same for lists of gradients, states and steps.
    """

    def batch(
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        options: Options,
        steps: Sequence[int],
        shape: tuple[int, int],
    ) -> Sums[list[T]]:
        matrices = zip(grads, states, steps, strict=True)
        return (
            yield from together([rule(g, s, options, t, shape) for g, s, t in matrices])
        )

    return batch


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
