"""Creates the states of parameters, with the first values that their table says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sharded_adadiag.algorithm.state import Rule
from sharded_adadiag.params.local import LocalParam, local
from sharded_adadiag.plan.matrices import MatrixPlan
from sharded_adadiag.step.states import specs_of, state_shapes


def allocate(
    entries: Iterable[LocalParam], matrices: Iterable[MatrixPlan], rule: Rule, rank: int
) -> None:
    """Create every state tensor that is missing, with the same keys on all ranks.

    Args:
        entries: The parameters.
        matrices: The plan of those that are seen as matrices.
        rule: The optimizer.
        rank: This rank.

    Raises:
        ValueError: If an unpickled state tensor has another shape than planned.
    """
    planned: dict[int, list[MatrixPlan]] = {}
    for matrix in matrices:
        planned.setdefault(matrix.index, []).append(matrix)
    for i, entry in enumerate(entries):
        if not entry.member:
            continue
        state = entry.state()
        state.setdefault("step", torch.tensor(0.0))
        if i not in planned:
            _allocate_plain(entry, state, rule)
            continue
        specs = specs_of(planned[i])
        for key, (shape, dtype) in state_shapes(planned[i], rank).items():
            if key not in state:
                device = entry.param.device
                state[key] = torch.empty(shape, dtype=dtype, device=device)
                specs[key].begin(state[key])
            elif tuple(state[key].shape) != shape:
                raise ValueError(
                    f"{entry.spec.name}: loaded state {key!r} has shape "
                    f"{tuple(state[key].shape)}, expected {shape}; a pickled "
                    "optimizer continues on one process only"
                )


def _allocate_plain(entry: LocalParam, state: dict[str, Any], rule: Rule) -> None:
    options = entry.spec.options
    dtype = options.state_dtype or entry.spec.dtype
    for key in rule.plain_states(options):
        if key not in state:
            state[key] = entry.zeros_like(dtype)
        elif local(state[key]).shape != entry.param.shape:
            raise ValueError(
                f"{entry.spec.name}: loaded state {key!r} has shape "
                f"{tuple(local(state[key]).shape)}, expected "
                f"{tuple(entry.param.shape)}"
            )
