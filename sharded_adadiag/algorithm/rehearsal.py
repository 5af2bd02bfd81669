"""What sums a moment rule asks for, found without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.algorithm.sums import PartialSum, run
from sharded_adadiag.algorithm.update import moment_rule
from sharded_adadiag.options import Options


class Asked(NamedTuple):
    """A sum that a rule waits for.

    Attributes:
        over: What is summed over: ``"rows"``, ``"cols"`` or ``"all"`` entries.
        dtype: Dtype of the sum.
        nbytes: Bytes of the sum.
    """

    over: Literal["rows", "cols", "all"]
    dtype: torch.dtype
    nbytes: int


def rehearse(
    rule: Rule,
    block: tuple[tuple[int, ...], torch.dtype],
    states: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    options: Options,
    shape: tuple[int, int],
) -> list[list[Asked]]:
    """Run the moment rule of one matrix on tensors of the meta device.

    Args:
        rule: The optimizer.
        block: Shape and dtype of one rank's block of the rotated gradient.
        states: Shape and dtype of what is kept for that block.
        options: The options of the matrix's group.
        shape: ``(m, n)`` of the full matrix.

    Returns:
        What the rule asks for each time it waits.
    """
    waits: list[list[Asked]] = []

    def note(asked: list[PartialSum]) -> list[Tensor]:
        waits.append([Asked(s.over, s.value.dtype, s.value.nbytes) for s in asked])
        return [s.value for s in asked]

    with torch.device("meta"):
        grad = torch.empty((1, *block[0]), dtype=block[1])
        kept = {key: torch.empty(size, dtype=dt) for key, (size, dt) in states.items()}
        run(moment_rule(rule, grad, [kept], options, 1, shape), note)
    return waits
